"""The ends of a model: its input convolutions and its output heads, which AdamW updates instead of Muon.

This module decides by structure first: a matrix after the last repeated block and outside all blocks is output; a
convolution before the first block that no embedding feeds is input. Names decide only where structure does not: a head
that was registered first, the head of a second tower. The module knows names, shapes and classes of modules; it knows
no rank and no tensor.

[Note: repeated blocks] A module is a block if it holds more than one plain layer and
  - is an element of a ModuleList, or the only element of a numbered container,
  - or has a sibling of its class, or of its name but for a number (layer1, layer2), or with weights of the same shapes.
A Sequential is not a block because of its class (any two would be); its children are examined instead. Siblings that
are chains of layers from one width to different widths are not blocks, since none feeds the next: they are heads, or
separate networks (an actor and a critic). Modules named like a head are not blocks either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile

from torch import nn

from distmuon.layout.layers import Path, Structure, Use
from distmuon.layout.names import is_bridge, is_head, words

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class End:
    """An input or an output of the model. `is_certain`: the model, a name or the place of blocks proves it."""

    side: str
    reason: str
    is_certain: bool = True


@dataclass(slots=True, eq=False)
class _Node:
    """A module in the tree of names. `uses`: positions of its subtree's matrices and embeddings, a contiguous range."""

    path: Path
    children: dict[str, _Node] = field(default_factory=dict)
    direct: list[int] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path[-1] if self.path else ""

    @property
    def is_compound(self) -> bool:
        """Whether it holds more than one plain layer."""
        return len(self.uses) > len(self.direct) or len(self.direct) > 1


def ends(structure: Structure) -> dict[str, End]:
    """The inputs and outputs among the model's matrices, by the parameter's first name."""
    return _Ends(structure).found


class _Ends:
    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.uses = [use for use in structure.uses if use.is_matrix or _is_table(use)]
        self.root = self._tree()
        self.blocks: list[_Node] = []
        self.networks: list[list[_Node]] = []
        self._find_blocks(self.root)
        self.widths = {use.inputs for use in self.uses}
        self.in_blocks = {i for block in self.blocks for i in block.uses}
        self.found: dict[str, End] = {}
        self._inputs()
        self._outputs()

    def _tree(self) -> _Node:
        root = _Node(())
        for index, use in enumerate(self.uses):
            node = root
            node.uses.append(index)
            for part in use.path:
                node = node.children.setdefault(part, _Node((*node.path, part)))
                node.uses.append(index)
            node.direct.append(index)
        return root

    # ------------------------------------------------------------------------------------------------------- blocks

    def _find_blocks(self, node: _Node) -> None:
        """See [Note: repeated blocks]."""
        candidates = [child for child in node.children.values() if child.is_compound and not is_head(child.name)]
        repeated: set[str] = set()
        for group in self._repeated_groups(node, candidates):
            if self._is_parallel(group):
                self.networks.append(group)
            else:
                repeated |= {child.name for child in group}
        for child in candidates:
            if child.name in repeated:
                self.blocks.append(child)
            elif not any(child in group for group in self.networks):
                self._find_blocks(child)

    def _repeated_groups(self, node: _Node, candidates: list[_Node]) -> Iterator[list[_Node]]:
        """Yield groups of `candidates`, children of `node`, that repeat each other."""
        classes = self.structure.classes
        containers = [child for child in candidates if classes.get(child.path) in _CONTAINERS]
        others = [child for child in candidates if child not in containers]
        kind = classes.get(node.path)
        is_list = kind is not None and issubclass(kind, nn.ModuleList)
        if (is_list and others) or (len(others) == len(node.children) == 1 and others[0].name.isdigit()):
            yield others
        groups: dict[object, list[_Node]] = {}
        for child in others:
            groups.setdefault(("name", re.sub(r"\d+$", "", child.name), classes.get(child.path)), []).append(child)
            if child.path in classes and not (self._holds_list(child) and not child.name[-1:].isdigit()):
                groups.setdefault(("class", classes[child.path]), []).append(child)
        for child in candidates:
            groups.setdefault(("weights", self._weights(child)), []).append(child)
        yield from (group for group in groups.values() if len(group) > 1)

    def _holds_list(self, node: _Node) -> bool:
        """Whether it is a tower, that is, holds blocks in a list."""
        return any(
            any(name.isdigit() and child.is_compound for name, child in inner.children.items())
            for inner in _subtree(node)
        )

    def _weights(self, node: _Node) -> tuple[object, ...]:
        depth = len(node.path)
        return tuple((self.uses[i].path[depth:], self.uses[i].name, self.uses[i].shape) for i in node.uses)

    def _is_parallel(self, group: Sequence[_Node]) -> bool:
        """Whether they are short chains of layers that begin or end with one width, none of which feeds the next."""
        chains = [[self.uses[i] for i in child.uses] for child in group]
        if len(chains) < 2 or not all(len(chain) < 5 and _is_chain(chain) for chain in chains):
            return False
        feeds = any(before[-1].outputs == after[0].inputs for before, after in pairwise(chains))
        begin, end = ({chain[at].inputs if at == 0 else chain[at].outputs for chain in chains} for at in (0, -1))
        return not feeds and (len(begin) == 1 or len(end) == 1)

    # ------------------------------------------------------------------------------------------------------- inputs

    def _inputs(self) -> None:
        convolutions = [i for i, use in enumerate(self.uses) if use.kind in ("convolution", "depthwise")]
        for index in convolutions:
            if self._is_first_convolution(index, convolutions):
                self._input(index, "first convolution")
        for node in _subtree(self.root):
            if _is_patch(node.name) and node.uses and node.uses[0] not in self.in_blocks:
                pictures = [i for i in node.uses if self._takes_pictures(i)]
                for index in pictures or node.uses[:1]:
                    self._input(index, "patch embedding")

    def _takes_pictures(self, index: int) -> bool:
        """Whether it is a convolution with few input channels, as for an image, a mask, a waveform or a latent."""
        return self.uses[index].kind == "convolution" and self.uses[index].inputs <= 4

    def _input(self, index: int, reason: str) -> None:
        if self.uses[index].is_layer:
            self.found.setdefault(self.uses[index].fqn, End("input", reason, is_certain=bool(self.blocks)))

    def _is_first_convolution(self, index: int, convolutions: list[int]) -> bool:
        """Whether no layer feeds it and no block precedes it, in the model or in a tower that takes pictures."""
        use = self.uses[index]
        if index == 0:
            return True
        if index in self.in_blocks or use.kind == "depthwise":
            return False
        is_picture = self._takes_pictures(index)
        node = self.root
        for part in (*use.path, ""):
            first = node.uses[0]
            within = [i for i in self.in_blocks if first <= i <= node.uses[-1]]
            unfed = not any(self.uses[i].kind == "embedding" or not within for i in range(first, index))
            is_first = not any(first <= i < index for i in convolutions) and all(index < i for i in within)
            if node is self.root:
                if is_first and (is_picture or unfed):
                    return True
            elif is_first and within and is_picture:
                return True
            node = node.children.get(part, node)
        return False

    # ------------------------------------------------------------------------------------------------------ outputs

    def _outputs(self) -> None:
        for fqn in self.structure.heads:
            self.found[fqn] = End("output", "named by the model as its output")
        named = self._named_heads()
        for index, name in named.items():
            self._output(index, f"called {name!r}")
        self._vocabulary()
        if self.blocks:
            self._after_blocks()
        else:
            self._last_layers(self.root, list(named))
        for group in self.networks:
            if any(len(self.uses) - 1 in network.uses for network in group):
                for network in group:
                    self._last_layers(network, [])

    def _output(self, index: int, reason: str, *, is_certain: bool = True) -> None:
        if self.uses[index].is_matrix:
            self.found.setdefault(self.uses[index].fqn, End("output", reason, is_certain))

    def _named_heads(self) -> dict[int, str]:
        """{position: name} of layers named like a head, and last layers of small modules named so, outside blocks."""
        found: dict[int, str] = {}
        for node in _subtree(self.root):
            if not is_head(node.name) or not node.uses or node.uses[-1] in self.in_blocks:
                continue
            layers = [self.uses[i] for i in node.uses]
            if len(layers) < 5 and all(use.is_layer for use in layers):
                plain = [child.uses[0] for child in node.children.values() if not child.is_compound]
                is_list = len(plain) == len(layers) and not _is_chain(layers)
                found |= dict.fromkeys(plain if is_list else node.uses[-1:], node.name)
        return found

    def _vocabulary(self) -> None:
        """Record layers that map to the vocabulary of the largest embedding, outside blocks or named like a head."""
        sizes = [use.shape[0] for use in self.uses if _is_table(use)]
        for index, use in enumerate(self.uses):
            if not sizes or not use.is_layer or use.outputs != max(sizes) or not self._is_dead_end(index):
                continue
            if index not in self.in_blocks or (use.path and is_head(use.path[-1])):
                self._output(index, "maps to the vocabulary")

    def _is_dead_end(self, index: int) -> bool:
        """Whether no layer of the model takes as many inputs as this layer has outputs."""
        return self.uses[index].outputs not in self.widths

    def _after_blocks(self) -> None:
        last = max(self.in_blocks)
        reason = "after the last repeated block"
        after = [i for i in range(last + 1, len(self.uses)) if self.uses[i].is_matrix]
        if len(after) > len(self.in_blocks):  # more than the blocks hold, so the blocks are not the trunk
            after = [i for i in after if (self.uses[i].is_layer and self._is_dead_end(i)) or i == after[-1]]
        classes, trunks = self._block_classes(), self._trunks(last)
        late = [i for i in after if not any(self.uses[i].path[: len(path)] == path for path in trunks)]
        late = [i for i in late if not any(is_bridge(part) for part in self.uses[i].path)]
        late = [i for i in late if not self._is_of_class(i, classes) or (i == late[-1] and self._is_dead_end(i))]
        for index in late:
            if index == late[-1] or self.uses[index].kind not in ("convolution", "depthwise"):
                self._output(index, reason)
        self._beside(late, reason, is_certain=True)

    def _trunks(self, last: int) -> list[Path]:
        """Modules that the model's declared head follows; late matrices in them (a projector) are hidden matrices."""
        found = []
        block = self.uses[last].path
        for use in self.uses[last + 1 :]:
            if use.fqn in self.structure.heads and use.is_layer:
                common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(use.path, block)))
                found.append(block[: common + 1])
        return found

    def _block_classes(self) -> set[type]:
        """Classes of blocks: the middle of a U-Net, registered after both of its sides, is a block by its class."""
        classes = {self.structure.classes.get(block.path) for block in self.blocks}
        return {kind for kind in classes if kind is not None and kind not in _CONTAINERS}

    def _is_of_class(self, index: int, classes: set[type]) -> bool:
        path = self.uses[index].path
        return any(self.structure.classes.get(path[:depth]) in classes for depth in range(1, len(path) + 1))

    def _last_layers(self, scope: _Node, named: list[int]) -> None:
        """Record the last layer in `scope`, and the parallel layers before it that map from the same width."""
        layers = [i for i in scope.uses if self.uses[i].is_matrix or self.uses[i].kind == "embedding"]
        if not layers or not self.uses[layers[-1]].is_matrix:
            return
        last = self.uses[layers[-1]]
        feeds = any(self.uses[head].inputs == last.outputs and head < layers[-1] for head in named)
        if not last.is_layer or last.kind == "unknown" or feeds or self._repeats(layers[-1], layers):
            return
        reason = "last layer of a model without repeated blocks"
        self._output(layers[-1], reason, is_certain=False)
        self._beside(layers, reason, is_certain=False)

    def _beside(self, layers: list[int], reason: str, *, is_certain: bool) -> None:
        """Record the layers before the last of `layers` that map from the same width, and that feed no other layer."""
        for index, after in zip(layers[-2::-1], layers[:0:-1]):
            use, following = self.uses[index], self.uses[after]
            if not use.is_layer or use.inputs != following.inputs or use.outputs == following.inputs:
                break
            self._output(index, reason if is_certain else f"beside the {reason}", is_certain=is_certain)

    def _repeats(self, index: int, layers: list[int]) -> bool:
        """Whether it is an element of a ModuleList of layers of one shape, n -> n, which are themselves blocks."""
        use = self.uses[index]
        kind = self.structure.classes.get(use.path[:-1])
        if kind is None or not issubclass(kind, nn.ModuleList) or use.inputs != use.outputs:
            return False
        beside = [self.uses[i] for i in layers if self.uses[i].path[:-1] == use.path[:-1]]
        return len(beside) > 1 and len({other.shape for other in beside}) == 1


def _subtree(node: _Node) -> Iterator[_Node]:
    yield node
    for child in node.children.values():
        yield from _subtree(child)


def _is_table(use: Use) -> bool:
    """Whether it is the table of an embedding module, not a raw parameter with such a name."""
    return use.kind == "embedding" and use.name == "weight" and len(use.shape) == 2


def _is_chain(layers: Sequence[Use]) -> bool:
    """Whether all are single layers, and each takes the outputs of the layer before it."""
    fits = all(before.outputs == after.inputs for before, after in pairwise(layers))
    return bool(layers) and fits and all(use.is_layer for use in layers)


def _is_patch(part: str) -> bool:
    """Whether a module's name is that of a patch embedding, or ends in "embed_tokens"."""
    found = words(part)
    is_patch = any(word.startswith("patch") for word in found) and found[-1].startswith(("embed", "patchify"))
    return is_patch or found[-2:] == ["embed", "tokens"]
