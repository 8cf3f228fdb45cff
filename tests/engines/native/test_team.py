"""The threads that share the kernels' work: each unit is done once, whoever takes it, however late a thread comes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from helpers.native import needs_kernels, random_masks, step, twin
from spfde.engines.native import build

# Jobs of several sizes by several threads under a sanitizer; one thread comes late, another one never.
_PROGRAM = r"""
#include "team.h"
#include <cstdio>
#include <thread>

int main() {
  const int64_t threads = 4;
  long wrong = 0;
  for (int round = 0; round < 40; round++) {
    Team ours(threads);
    std::vector<std::thread> others;
    for (int64_t k = 1; k < threads - 1; k++) {
      others.emplace_back([&ours, k, round] {
        if (k == 2 && round % 2) std::this_thread::sleep_for(std::chrono::microseconds(300));
        ours.work(k);
      });
    }
    for (int64_t job = 0; job < 60; job++) {
      const int64_t n = job % 7 == 0 ? 0 : job % 5 == 0 ? 70000 : job;
      std::vector<int> done(static_cast<size_t>(n));
      ours.share(n, [&](int64_t i) { done[static_cast<size_t>(i)]++; });
      for (int each : done) wrong += each != 1;
      if (job % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));  // the others sleep
    }
    ours.close();
    for (auto& other : others) other.join();
  }
  std::printf("%ld\n", wrong);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("sanitizer", ["thread", pytest.param("address,undefined", marks=pytest.mark.long)])
def test_each_unit_is_done_once_by_whichever_thread_is_free(sanitizer: str, tmp_path: Path) -> None:
    source, made = tmp_path / "team.cpp", tmp_path / "team"
    source.write_text(_PROGRAM)
    flags = ["-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", f"-I{build.SOURCES}"]
    built = subprocess.run(["g++", *flags, str(source), "-o", str(made)], capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:
        pytest.skip(f"no runtime of -fsanitize={sanitizer}")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([made], capture_output=True, text=True, check=False, timeout=100)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("ThreadSanitizer does not run on this system")
    assert (ran.returncode, ran.stdout) == (0, "0\n"), ran.stderr


@needs_kernels
def test_numbers_do_not_depend_on_which_thread_takes_what() -> None:
    """More threads than cores, so that some come late."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 9, 3), torch.nn.BatchNorm2d(9), torch.nn.ReLU()).double()
    masks = random_masks(model, 0.4)
    twin(model, masks)
    x, before = torch.randn(19, 3, 9, 9, dtype=torch.float64), torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        step(model, x)
        model[1].reset_running_stats()
        first = step(model, x)
        for _ in range(30):
            model[1].reset_running_stats()
            again = step(model, x)
            assert all(torch.equal(again[name], first[name]) for name in first)
    finally:
        torch.set_num_threads(before)
