"""The blocks of a model, in order of execution.

A block is the unit that is frozen at once (a residual block, a transformer layer, or one layer of a plain chain).
Blocks are told from the module tree, and put in the order in which a traced forward pass runs them, not the one in
which they were defined. Each block ends before the next one starts, so every prefix of the blocks can be frozen: what
runs before the boundary reads nothing but frozen parameters, hence backpropagation stops there, whatever the skip
connections. Parts of a model that read the same parameters cannot be separated and become one block; a part that shares
a parameter with the head is never frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby, pairwise
from operator import or_

from torch import nn

from spfde.core.errors import Problems, nearest
from spfde.model.sample import unwrap
from spfde.model.trace import Trace
from spfde.model.units import Reader, Unit, merge

_UNTIE = (
    "Train it without freezing, or give the head a parameter of its own (in Transformers: tie_word_embeddings=False)."
)


@dataclass(frozen=True)
class Block:
    """What is frozen at once."""

    name: str  # of the module that it is built on
    parameters: tuple[str, ...]  # qualified names of its parameters
    modules: tuple[str, ...]  # qualified names of the modules inside it
    start: int  # position of its first operation in the trace
    stop: int  # position after its last one
    n_layers: int  # number of weighted layers: weights of convolutions and matrix products
    whole: str | None = None  # name of the block that it was cut from, where blocks are cut into layers


@dataclass(frozen=True)
class Partition:
    """A model cut into blocks."""

    blocks: tuple[Block, ...]  # in order of execution; together with the head they cover the whole trace
    head: Block  # what follows the last block and is never frozen
    reason: str | None = None  # why there is no block, where there is none
    remedy: str | None = None  # and what to do about it

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of how many layers each block is that was cut into layers; 1 for one that was not."""
        wholes = groupby(block.whole or block.name for block in self.blocks)
        return tuple(len(list(parts)) for _, parts in wholes)


def find_blocks(
    model: nn.Module, trace: Trace, *, blocks: Sequence[str] | None = None, by_layer: bool = False
) -> Partition:
    """Cut ``model`` into blocks.

    The stem joins the first block, a down-sampling layer between two blocks joins the one that follows, norms and bare
    parameters join the block before them. After the last block comes the head: everything behind the last module of
    several layers; in a plain chain (VGG's features, an MLP), where each weighted layer is a block, the last one.

    Args:
        model: the traced model.
        trace: its forward pass.
        blocks: names of the modules to be frozen at once, in order of execution; what comes after the last one is the
            head. A name that no module has stands for all modules whose names begin with it, which are one block. None:
            found from the module tree.
        by_layer: cut each block into its weighted layers. A layer has the norm and the bare parameters that run behind
            it; layers whose parameters are read by turns stay one.

    Raises:
        InvalidArgument: ``blocks`` is empty, or a name in it is unknown, inside another one, never run, out of order,
            inseparable from another one (they run interleaved or share a parameter), or leaves no layer for the head.
    """
    reader = Reader(unwrap(model), trace)
    given: dict[str, str] = {}
    if blocks is not None:
        given = _resolved(reader.model, blocks)
        units = _joined(merge(reader.units(named=frozenset(given))), given)
        anchors = _named_anchors(units, blocks, given, reader)
    else:
        units = merge(_trunk_opened(reader))
        anchors = _anchors(units)
    cuts = _cuts(units, anchors)
    head = next((unit.name for unit in reversed(units) if unit.layers), "")
    names = [*(units[anchor].named(given) for anchor in anchors[:-1]), head]
    starts = [0, *(units[cut].first for cut in cuts[1:])]
    ends = zip([*cuts[1:], len(units)], [*starts[1:], len(trace.ops)], strict=True)
    found = [
        _block(reader, name, units[cut:after], start=start, stop=stop, all_units=units)
        for name, cut, start, (after, stop) in zip(names, cuts, starts, ends, strict=True)
    ]
    reason, remedy = _reason(units, reader) if len(found) == 1 else (None, None)
    parts = _cut_by_layer(reader, found[:-1], frozenset(given)) if by_layer else found[:-1]
    return Partition(tuple(parts), found[-1], reason, remedy)


def _block(
    reader: Reader, name: str, units: Sequence[Unit], *, start: int, stop: int, all_units: Sequence[Unit]
) -> Block:
    """The block of ``units``, with the modules inside them and those without parameters that ran among them."""

    def inside(module: str, of: Sequence[Unit]) -> bool:
        return any(module == n or module.startswith(f"{n}.") for unit in of for n in unit.names)

    def ran_here(module_name: str, module: nn.Module) -> bool:
        is_leaf = next(module.children(), None) is None
        if not is_leaf or module_name not in reader.first_run or inside(module_name, all_units):
            return False
        return start <= max(reader.first_run[module_name] - 1, 0) < stop

    modules = [n for n, module in reader.model.named_modules() if n and (inside(n, units) or ran_here(n, module))]
    held = frozenset(p for unit in units for p in unit.parameters)
    parameters = sorted((p for p in reader.names.values() if p in held), key=lambda p: reader.uses[p][0])
    return Block(name, tuple(parameters), tuple(modules), start, stop, sum(len(unit.layers) for unit in units))


def _cut_by_layer(reader: Reader, blocks: Sequence[Block], named: frozenset[str]) -> list[Block]:
    """The layers of all blocks, in order of execution. What is opened here holds what is opened for blocks."""
    units = merge(reader.units(named=named, by_layer=True))
    found = []
    for block in blocks:
        parts: list[list[Unit]] = [[]]
        for unit in units:
            if block.start <= unit.first < block.stop:
                if unit.layers and any(other.layers for other in parts[-1]):
                    parts.append([])
                parts[-1].append(unit)
        starts = [block.start, *(part[0].first for part in parts[1:]), block.stop]
        names = [next((unit.name for unit in part if unit.layers), block.name) for part in parts]
        layers = [
            replace(_block(reader, name, part, start=start, stop=stop, all_units=units), whole=block.name)
            for name, part, (start, stop) in zip(names, parts, pairwise(starts), strict=True)
        ]
        found += _with_modules_of(block, layers)
    return found


def _with_modules_of(block: Block, layers: Sequence[Block]) -> list[Block]:
    """The layers of a block; a module that holds several belongs to its last one, which alone completes it."""
    held = {name for layer in layers for name in layer.modules}
    modules = [list(layer.modules) for layer in layers]
    for name in block.modules:
        if name not in held:
            inside = (at for at, layer in enumerate(layers) if any(p.startswith(f"{name}.") for p in layer.parameters))
            modules[max(inside, default=-1)].append(name)
    return [replace(layer, modules=tuple(own)) for layer, own in zip(layers, modules, strict=True)]


def _trunk_opened(reader: Reader) -> list[Unit]:
    """The model's units; a module with more than half of all layers is opened, where that separates layers."""
    opened: set[str] = set()
    while True:
        units = reader.units(opened=opened)
        trunk = max(units, key=lambda unit: len(unit.layers), default=None)
        if trunk is None or 2 * len(trunk.layers) <= len(reader.layers) or trunk.names[0] in reader.uses:
            return units
        module = reader.model.get_submodule(trunk.names[0])
        shares = [len(reader.layers_in(child)) for child in module.children()]
        # Attention has one of its weights in a child: there is nothing to separate.
        if sum(share > 0 for share in shares) < 2 and max(shares, default=0) < len(trunk.layers):
            return units
        opened.add(trunk.names[0])


def _joined(units: list[Unit], given: Mapping[str, str]) -> list[Unit]:
    """Units in order of execution; those of one prefix, and what runs between them, become one."""
    for name in dict.fromkeys(given.values()):
        of_name = [index for index, unit in enumerate(units) if any(given.get(n) == name for n in unit.names)]
        if len(of_name) > 1:
            first, last = of_name[0], of_name[-1]
            units = [*units[:first], reduce(or_, units[first : last + 1]), *units[last + 1 :]]
    return units


def _anchors(units: list[Unit]) -> list[int]:
    """Indices of the units that blocks are built on; the last one starts the head."""
    weighted = [index for index, unit in enumerate(units) if unit.layers]
    composite = [index for index in weighted if units[index].composite]
    if not composite or composite == weighted[-1:]:
        return weighted
    return composite if composite[-1] == weighted[-1] else [*composite, composite[-1] + 1]


def _cuts(units: list[Unit], anchors: list[int]) -> list[int]:
    """Index of the first unit of each block and of the head."""
    cuts = [0]
    for before, anchor in pairwise(anchors):
        cut = before + 1
        # A norm between two blocks belongs to the one before, unless it leads a down-sampling branch of its own.
        while cut < anchor and not units[cut].layers and units[cut].parents & units[before].parents:
            cut += 1
        between = units[cut:anchor]
        cuts.append(cut if any(unit.layers for unit in between) else anchor)
    return cuts


def _reason(units: list[Unit], reader: Reader) -> tuple[str, str]:
    """Why nothing can be frozen, and what to do."""
    if not reader.layers:
        return "no convolution or matrix product with a trained weight was found", "Train it without freezing."
    if len(reader.layers) == 1:
        return "it has a single layer, which is the head", "Train it without freezing."
    head = units[-1] if units[-1].layers else max(units, key=lambda unit: len(unit.layers))
    spans = {name: reader.uses[name][1] - reader.uses[name][0] for name in head.parameters}
    widest = max(spans, key=lambda name: (spans[name], name in reader.layers))
    reason = f"the parameter '{widest}' is read by the front of the model and by its head, which is never frozen"
    # Read once, it cannot be what keeps the layers together: they run interleaved, which smaller blocks may not.
    named = "Train it without freezing, or name the blocks with ProgressiveFreezing(blocks=...)."
    return reason, _UNTIE if spans[widest] else named


def _resolved(model: nn.Module, blocks: Sequence[str]) -> dict[str, str]:
    """Names of the modules that ``blocks`` stand for, with the name that was given for each."""
    problems = Problems()
    known = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    if not blocks:
        problems.add("blocks", blocks, "must name at least one module", "Pass None to have the blocks found.")
    found: dict[str, str] = {}
    for given in blocks:
        # A module's own name comes first: layer1 does not stand for layer10.
        begins = [name for name in known if name.startswith(given)]
        matching = [given] if given in known else [n for n in begins if n.rpartition(".")[0] not in begins]
        found |= dict.fromkeys(matching, given)
        if not matching:
            rule = "is no module with parameters of the model, and none begins with it"
            nearby = nearest(given, [n for n in known if n.count(".") <= given.count(".")])
            problems.add("blocks", given, rule, nearby)
        for other in blocks:
            if given != other and given.startswith(f"{other}." if other in known else other):
                problems.add("blocks", given, f"lies inside the block '{other}'", "Name one of the two.")
    if len(set(blocks)) < len(blocks):
        problems.add("blocks", blocks, "must not name a module twice", "Name each module once.")
    problems.raise_if_any()
    return found


def _named_anchors(units: list[Unit], blocks: Sequence[str], given: Mapping[str, str], reader: Reader) -> list[int]:
    """As ``_anchors``, for blocks that the user named."""
    problems = Problems()
    anchors = [index for index, unit in enumerate(units) if unit.composite]
    has_head = not anchors or any(unit.layers for unit in units[anchors[-1] + 1 :])
    tied = None if has_head else _tied(units[anchors[-1]], given, reader)
    if tied is not None:
        rule = f"cannot be frozen: the parameter '{tied}' is read by the front of the model and by its head"
        problems.add("blocks", tuple(blocks), rule, _UNTIE)
        problems.raise_if_any()
    order = [list(dict.fromkeys(given[name] for name in units[index].names if name in given)) for index in anchors]
    for names in order:
        if len(names) > 1:
            rule = "run interleaved or share a parameter, so that neither can be frozen before the other"
            problems.add("blocks", tuple(names), rule, "Name a module that holds both.")
    flat = [name for names in order for name in names]
    unused = [name for name in blocks if name not in flat]
    for name in unused:
        problems.add("blocks", name, "reads no parameter in the forward pass", "Leave it out.")
    if flat != [name for name in blocks if name not in unused]:
        problems.add("blocks", tuple(blocks), "must be in order of execution", f"Pass blocks={tuple(flat)!r}.")
    if not has_head:
        rule = "leaves no layer for the head, which is never frozen"
        shared = [p for p in units[anchors[-1]].parameters if reader.uses[p][1] == units[anchors[-1]].last]
        hint = f" (it reads '{shared[0]}' last)" if shared else ""
        problems.add("blocks", flat[-1], rule + hint, "Leave the last block out, or name smaller modules.")
    problems.raise_if_any()
    return [*anchors, anchors[-1] + 1]


def _tied(unit: Unit, given: Mapping[str, str], reader: Reader) -> str | None:
    """The parameter, of no named module, that the last unit reads in front of them and once more at its end."""
    ends = (p for p in sorted(unit.parameters) if reader.uses[p][0] < reader.uses[p][1] == unit.last)
    return next((p for p in ends if not any(p.startswith(f"{module}.") for module in given)), None)
