"""What may be asked of the prefix cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import spfde


def test_it_is_plain_data() -> None:
    cache = spfde.PrefixCache(2, folder="somewhere")
    assert cache == spfde.PrefixCache(variants=2, precision="fp16", limit_gib=8.0, folder=Path("somewhere"))
    assert hash(cache)
    with pytest.raises(Exception, match="frozen"):
        cache.variants = 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"variants": 0}, "variants"),
        ({"variants": 1.5}, "variants"),
        ({"variants": 1, "precision": "fp8"}, "precision"),
        ({"variants": 1, "limit_gib": 0}, "limit_gib"),
        ({"variants": 1, "size": 3}, "size"),
    ],
)
def test_a_setting_that_breaks_its_rule_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(spfde.InvalidArgument) as refused:
        spfde.PrefixCache(**settings)
    assert [problem.argument for problem in refused.value.problems] == [named]
