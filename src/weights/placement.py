"""Where each weight of a model lives: on the card, or in the host's memory until it is needed.

    sizes of the weights + a machine + what is asked of it  ->  the fastest placement that fits

Every decision about memory, and nothing that acts on it; knows nothing of torch. Sizes are in bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from src.catalog import MEMORY_MODES, QUANTIZATIONS

GB = 10**9

# Of a card's memory, for what no header tells: the libraries' own, what is splintered.
_SPARE = 0.04
# Values that one token has in flight in a block, in widths of the model: the stream and its norm (2), queries, keys and
# values (3), queries and keys with their positions in float32 (2 x 2), the attention's answer (1), a single block's MLP
# before and after its activation (2 x 4), what is joined of both (5), and its product (1).
_IN_FLIGHT = 24
# And where each token has its own: its embedding before and after an activation (2), shift, scale and gate of its
# kind's blocks and of the joint ones (2 x 3).
_MODULATED = 8
# Values that one pixel has in flight in the decoder, in channels of its last block: FLUX.1 takes 2.5 GB above its
# weights for 1024x1024 in bfloat16 (33.9 GB at the peak, 31.4 GB of weights), and has 128 channels there.
_DECODING = 9.3
# Bytes that a value of a packed layer takes while it is at work: in float32, its parts on the way there, in 16 bits.
# Counted on the CPU at the peak: 8.1 of Q8_0, 9.3 of Q4_K, 11.5 of Q6_K, 12.3 of IQ4_XS.
_UNPACKING = 12.5
TABLES = 2  # of adaptive norms computed ahead: of a prompt and of what it steers away from
# Of the time that moving and computing share, what is lost: layers streamed on an L20 took 1.05 times the time of
# everything resident.
_STREAMING = 0.05
SLOTS = 2  # the block that is at work and the next one, on its way


# Blocks with weights of their own for each kind of tokens: of FLUX's double blocks each has two halves, and FLUX.3 has
# blocks of words, of the picture and of references.
_KINDS = {"transformer_blocks.": 2, "mode_blocks.": 3, "txt_mode_blocks.": 3}


class DoesNotFit(Exception):
    """Says what is needed, what there is, and what may be chosen."""


# Chroma's distilled_guidance_layer stands for all adaptive norms: before the blocks, and small.
_BLOCK = re.compile(r"^(?!distilled_guidance_layer\.).*?\.\d+(?=\.)")
# norm1.linear, single_stream_modulation.linear; of FLUX.3, for each kind of tokens, early_stream_modulations.txt.linear
_MODULATION = re.compile(r"(?:^|\.)(?:norm\w*+|(?=\w*?modulation)\w++(?:\.\w++)?)\.linear$")


def block_of(tensor: str) -> str | None:
    """The block that a tensor or a layer belongs to, transformer_blocks.7, say; None for what is in none."""
    found = _BLOCK.match(tensor)
    return found[0] if found else None


def is_modulation(layer: str) -> bool:
    """Whether a layer is a linear of adaptive norms: those depend on step, guidance and pooled prompt alone."""
    return bool(_MODULATION.search(layer))


def in_order(blocks: Iterable[str]) -> list[str]:
    """Names of blocks by their lists, and by their numbers in each."""
    return sorted(set(blocks), key=lambda name: (name.rpartition(".")[0], int(name.rpartition(".")[2])))


def evenly(count: int, among: int) -> tuple[int, ...]:
    """`count` indices as far from each other as they can be: what streams has the others' time to arrive."""
    return tuple((2 * i + 1) * among // (2 * count) for i in range(count))


@dataclass(frozen=True)
class Network:
    """One component of a model by its sizes."""

    blocks: Mapping[str, int]  # in order, without their modulation
    modulation: Mapping[str, int]  # of each block; "" is what stands outside of them
    outside: int  # of all blocks
    kinds: Mapping[str, int] = field(default_factory=dict)  # of tokens, where each meets the weights of its own alone
    packing: float = 1.0  # bytes of the blocks, of one that they would have with all values apart

    @classmethod
    def of(
        cls, parameters: Mapping[str, int], itemsize: float, packed: Mapping[str, int] = MappingProxyType({})
    ) -> Network:
        """`parameters` is the number of values in each tensor, `itemsize` the bytes of one; of `packed` ones of all."""
        blocks = dict.fromkeys(in_order(block for name in parameters if (block := block_of(name))), 0)
        modulation: dict[str, int] = {}
        outside = apart = 0
        for name, values in parameters.items():
            size, block = packed.get(name, int(values * itemsize)), block_of(name)
            if is_modulation(name.rpartition(".")[0]):
                modulation[block or ""] = modulation.get(block or "", 0) + size
            elif block:
                blocks[block] += size
                apart += int(values * itemsize)
            else:
                outside += size
        kinds = {name: count for name in blocks for start, count in _KINDS.items() if name.startswith(start)}
        return cls(blocks, modulation, outside, kinds, sum(blocks.values()) / apart if apart else 1.0)

    @property
    def modulates_tokens(self) -> bool:
        """Whether shifts, scales and gates are made for each token, not once a picture: FLUX.3's, of three kinds."""
        return max(self.kinds.values(), default=1) > len(("words", "picture"))

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self.blocks.values()) + sum(self.modulation.values()) + self.outside


@dataclass(frozen=True)
class Weights:
    """A model by its sizes, and the few numbers of its configuration that say what a picture takes."""

    networks: Mapping[str, Network]  # by the pipeline's names: transformer, vae and text encoders
    itemsize: int  # bytes of one value: 2 in bfloat16
    width: int  # of the transformer: heads times their size
    channels: int  # of the decoder's last block
    stored: str | None = None  # what the transformer's weights are in their file, where that has less than 16 bits
    unpacking: int = 0  # bytes that its largest packed layer takes while it is at work

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, Mapping[str, int]],
        transformer: Mapping[str, Any],
        vae: Mapping[str, Any],
        itemsize: int,
        *,
        packed: Mapping[str, int] = MappingProxyType({}),
        stored: str | None = None,
    ) -> Weights:
        """`parameters` is the number of values in each tensor of each network; the two after it are configurations.

        `packed` has the bytes of those tensors of the transformer that stay packed, `stored` says in what.
        """
        return cls(
            {
                name: Network.of(values, itemsize, packed if name == "transformer" else {})
                for name, values in parameters.items()
            },
            itemsize,
            transformer["num_attention_heads"] * transformer["attention_head_dim"],
            vae["block_out_channels"][0],
            stored,
            int(_UNPACKING * max((parameters["transformer"][name] for name in packed), default=0)),
        )

    @property
    def transformer(self) -> Network:
        """What denoises: at work once a step, or twice."""
        return self.networks["transformer"]

    @property
    def text_encoders(self) -> Mapping[str, Network]:
        """At work once a prompt."""
        return {name: part for name, part in self.networks.items() if name not in ("transformer", "vae")}

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.size for part in self.networks.values())


@dataclass(frozen=True)
class Machine:
    """A card and its host: what is free of them, and how fast they were measured."""

    name: str
    memory: int  # bytes of the card
    host_memory: int
    flops: float  # floating-point operations a second, in a large product of matrices
    bandwidth: float  # bytes a second from the host's memory to the card
    shared: bool = False  # the card's memory is the host's: a CPU


@dataclass(frozen=True)
class Work:
    """The picture that a placement is made for."""

    width: int
    height: int
    num_inference_steps: int
    max_sequence_length: int
    max_pixels: int  # the largest picture that must fit
    batch_size: int = 1
    extra: int = 0  # bytes of weights that are on the card with the model: ControlNets, Redux, adapters
    usual_tokens: int | None = None  # of a prompt, where most are shorter than max_sequence_length

    def tokens(self, pixels: int) -> int:
        """Of the longest prompt; 16 pixels a side make one token."""
        return self.batch_size * (pixels // 256 + self.max_sequence_length)

    @property
    def own_tokens(self) -> int:
        """Of a usual prompt, and of the model's own size."""
        return self.batch_size * (self.width * self.height // 256 + (self.usual_tokens or self.max_sequence_length))


@dataclass(frozen=True)
class Placement:
    """What lives where, and what that costs."""

    machine: Machine
    modulation_cache: bool  # the adaptive norms' linears are in the host's memory, and a table of their answers here
    streamed: Mapping[str, tuple[int, ...]]  # blocks in the host's memory, by component and place in `in_order`
    offload: str | None
    quantization: str | None
    resident: int  # bytes of weights on the card
    offloaded: int  # bytes of weights in the host's memory
    slots: int  # bytes on the card for blocks that pass through
    peak: int  # bytes on the card, at most
    extra: int  # of them, what is not the model's: ControlNets, Redux, adapters
    prompt_seconds: float  # of a new prompt: waiting for weights
    step_seconds: float
    stored: str | None = None  # what the transformer's weights are in their file, where that has less than 16 bits

    @property
    def needs(self) -> float:
        """Bytes of a card that it fits."""
        return (self.peak + (self.offloaded if self.machine.shared else 0)) / (1 - _SPARE)

    @property
    def mode(self) -> str:
        """The row of MEMORY_MODES that it comes down to."""
        if self.quantization:
            return self.quantization
        if self.offload:
            return f"{self.offload}_offload"
        if self.streamed.get("transformer"):
            return "stream"
        return "modulation_cache" if self.modulation_cache else "stream" if any(self.streamed.values()) else "full"

    def with_extra(self, extra: int) -> Placement:
        """The same with so many bytes of other weights on the card."""
        return replace(self, peak=self.peak - self.extra + extra, extra=extra)

    def seconds(self, work: Work) -> float:
        """Of one picture with a new prompt, but for what all placements take alike."""
        return self.prompt_seconds + work.num_inference_steps * self.step_seconds

    def summary(self) -> dict[str, Any]:
        """For the log and for `describe`."""
        return {
            "mode": self.mode,
            "device": self.machine.name,
            "memory_gb": _gb(self.machine.memory),
            "expected_peak_gb": _gb(self.peak),
            "on_the_device_gb": _gb(self.resident),
            "in_host_memory_gb": _gb(self.offloaded),
            "modulation_cache": self.modulation_cache,
            "streamed_blocks": {name: len(blocks) for name, blocks in self.streamed.items() if blocks},
            "quantization": self.quantization or self.stored,
        }


def choose_placement(weights: Weights, machine: Machine, work: Work, mode: str = "auto") -> Placement:
    """The fastest placement of `mode` that fits, by the cost model; of equally fast ones that which moves least.

    Raises DoesNotFit with what is needed and what may be chosen instead.
    """
    fitting = [found for found in placements(weights, machine, work, mode) if _fits(found)]
    if not fitting:
        raise DoesNotFit(_too_little(weights, machine, work, mode))
    return min(fitting, key=lambda found: (found.seconds(work), found.offloaded))


def placements(
    weights: Weights, machine: Machine, work: Work, mode: str, *, onloaded: str | None = None
) -> Iterator[Placement]:
    """All that `mode` allows, whether they fit or not; those with the text encoder `onloaded` whole on the card."""
    row = MEMORY_MODES[mode]
    if row.offload:
        yield _offloaded(weights, machine, work, row.offload)
        return
    compute = flops(weights, work) / machine.flops
    if row.quantization:
        weights = _quantized(weights, QUANTIZATIONS[row.quantization].itemsize)
    transformer, working = weights.transformer, _working(weights, work) + work.extra
    encoders = list(_streamed_text_encoders(weights, onloaded, stream=row.stream_text_encoders))
    modulation = transformer.modulation
    for modulation_cache in dict.fromkeys(wanted and bool(modulation) for wanted in row.modulation_cache):
        apart = sum(modulation.values()) if modulation_cache else 0
        alone = max(modulation.values(), default=0) if modulation_cache else 0
        tables = TABLES * work.num_inference_steps * work.batch_size * apart // weights.width
        blocks = [
            size + (0 if modulation_cache else modulation.get(name, 0)) for name, size in transformer.blocks.items()
        ]
        for count in range(len(blocks) + 1 if row.stream_blocks else 1):
            passing = evenly(count, len(blocks))
            sizes = [blocks[index] for index in passing]
            moving = sum(sizes) / machine.bandwidth
            for streamed, encoder_bytes, largest_encoder in encoders:
                slots = SLOTS * max((alone, largest_encoder, *sizes))
                offloaded = sum(sizes) + encoder_bytes + apart
                yield Placement(
                    machine,
                    modulation_cache,
                    {"transformer": passing, **streamed},
                    offload=None,
                    quantization=row.quantization,
                    resident=weights.size - offloaded,
                    offloaded=offloaded,
                    slots=slots,
                    peak=weights.size - offloaded + slots + tables + working,
                    extra=work.extra,
                    prompt_seconds=(encoder_bytes + apart) / machine.bandwidth,
                    step_seconds=max(compute, moving) + _STREAMING * min(compute, moving),
                    stored=weights.stored,
                )


def _streamed_text_encoders(
    weights: Weights, onloaded: str | None, *, stream: bool
) -> Iterator[tuple[Mapping[str, tuple[int, ...]], int, int]]:
    """Ways to stream more and more of the text encoders but for `onloaded`: blocks, their bytes, the largest.

    The largest text encoder first, which may be a prompt upsampler: at work for some prompts alone.
    """
    streamed: dict[str, tuple[int, ...]] = {}
    total = largest = 0
    yield {}, total, largest
    if stream:
        others = {name: part for name, part in weights.text_encoders.items() if name != onloaded}
        for name, part in sorted(others.items(), key=lambda item: -item[1].size):
            for index, size in enumerate(part.blocks.values()):
                streamed[name] = tuple(range(index + 1))
                total, largest = total + size, max(largest, size)
                yield dict(streamed), total, largest


def _offloaded(weights: Weights, machine: Machine, work: Work, offload: str) -> Placement:
    """The ways of diffusers: a whole component on the card at a time, or each layer just while it is at work."""
    whole = offload == "model"
    parts = weights.networks.values()
    on_card = max(part.size if whole else max(part.blocks.values(), default=0) for part in parts)
    text_encoders = sum(part.size for part in weights.text_encoders.values())
    compute, transformer = flops(weights, work) / machine.flops, weights.transformer.size / machine.bandwidth
    return Placement(
        machine,
        modulation_cache=False,
        streamed={},
        offload=offload,
        quantization=None,
        resident=on_card,
        offloaded=weights.size,
        slots=0,
        peak=on_card + _working(weights, work) + work.extra,
        extra=work.extra,
        prompt_seconds=(weights.size if whole else text_encoders) / machine.bandwidth,
        step_seconds=compute + (0 if whole else transformer),
        stored=weights.stored,
    )


def _working(weights: Weights, work: Work) -> int:
    """Bytes that come and go: of the largest picture while it is denoised, of the model's own size when decoded.

    A larger one is decoded in tiles where memory is short.
    """
    in_flight = _IN_FLIGHT + (_MODULATED if weights.transformer.modulates_tokens else 0)
    denoising = work.tokens(work.max_pixels) * weights.width * weights.itemsize * in_flight
    pixels = work.batch_size * min(work.max_pixels, work.width * work.height)
    return int(max(denoising + weights.unpacking, pixels * weights.channels * weights.itemsize * _DECODING))


def flops(weights: Weights, work: Work) -> float:
    """Operations of one step at the model's own size: two for each weight and token, and attention of all with all."""
    transformer, tokens = weights.transformer, work.own_tokens
    met = sum(size / transformer.kinds.get(name, 1) for name, size in transformer.blocks.items())
    products = 2 * tokens * met / transformer.packing / weights.itemsize
    return products + 4 * tokens * tokens / work.batch_size * weights.width * len(transformer.blocks)


def _quantized(weights: Weights, itemsize: float) -> Weights:
    """With fewer bytes to a value in the transformer's blocks, their adaptive norms excepted."""
    transformer = weights.transformer
    blocks = {name: int(size * itemsize / weights.itemsize) for name, size in transformer.blocks.items()}
    return replace(weights, networks={**weights.networks, "transformer": replace(transformer, blocks=blocks)})


def _fits(placement: Placement) -> bool:
    return placement.needs <= placement.machine.memory and placement.offloaded <= placement.machine.host_memory


def smallest(weights: Weights, machine: Machine, work: Work, mode: str) -> float:
    """Bytes of the smallest card that `mode` fits, beside this host; infinite where the host has too little."""
    found = placements(weights, machine, work, mode)
    return min((each.needs for each in found if each.offloaded <= machine.host_memory), default=math.inf)


def _too_little(weights: Weights, machine: Machine, work: Work, mode: str) -> str:
    needs = {name: smallest(weights, machine, work, name) for name in MEMORY_MODES}
    instead = [name for name, needed in needs.items() if needed <= machine.memory]
    ways = [f"MEMORY_MODE={' or '.join(instead)}"] if instead else []
    least = min(needs[mode], needs["full"])
    ways += [f"a card of {_gb(least)} GB", "a smaller MAX_PIXELS", "a smaller MODEL_NAME"]
    host = "" if machine.shared else f" and its host {_gb(machine.host_memory)} GB"
    return (
        f"its weights take {_gb(weights.size)} GB, and with MEMORY_MODE={mode} pictures of {work.max_pixels:,} pixels "
        f"need {_gb(least)} GB; {machine.name} has {_gb(machine.memory)} GB free{host}: choose {', or '.join(ways)}"
    )


def _gb(size: float) -> float:
    return round(size / GB, 3 if size < GB / 10 else 1)
