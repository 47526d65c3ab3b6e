"""`python -m training.language` teaches flux-shapes' text encoders how everybody asks; the transformer stays as it is.

Where a sentence of `sentences.ask` is read, the transformer is to say what it says of the same scene in plain words, as
the encoders read them before: its velocities, and CLIP's vector, are the lesson. So the LoRA, the ControlNet and what
guidance distillation made stay right.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from training import networks, report, text
from training.flow import NATIVE, SMALL, encode_scenes, noised, velocity_of
from training.loop import fit
from training.scenes import Scene, describe, plain, sample
from training.sentences import ask
from training.text import TextEncoders


@dataclass(frozen=True)
class Stage:
    """`rate` is the peak of the learning rate, `native` the share of steps at the native size; of pairs `plainly` says
    how many are asked for in plain words, which must not be unlearnt."""

    steps: int
    rate: float
    native: float = 1 / 8
    plainly: float = 0.0


STAGES = {"language": Stage(5_000, 1e-3), "fluent": Stage(3_000, 6e-4)}
LAST = {
    "whose": Stage(600, 4e-4, native=1 / 2, plainly=3 / 5),
    "whose_large": Stage(350, 3e-4, native=1.0, plainly=1.0),
}
BATCH = 96  # sentences a step
DRAWN, DRAWN_NATIVE = 16, 14  # of which so many go through the transformer, by their size
SCENES = {SMALL: 6_000, NATIVE: 1_500}
NOISE = 1.3  # near the flow's: what only the prompt can tell
ROOT = Path(__file__).parent


def _pieces(tokenizer: CLIPTokenizer | T5Tokenizer) -> dict[str, int]:
    return {piece.lower(): number for piece, number in sorted(tokenizer.get_vocab().items())}


def _widened(
    network: CLIPTextModel | T5EncoderModel,
    wider: CLIPTextModel | T5EncoderModel,
    old: CLIPTokenizer | T5Tokenizer,
    new: CLIPTokenizer | T5Tokenizer,
) -> None:
    """Put what `network` knows into `wider`, which is the same but for a vocabulary of more words."""
    table, rows = network.get_input_embeddings().weight, wider.get_input_embeddings().weight
    with torch.no_grad():
        state = {name: value for name, value in network.state_dict().items() if value.shape != table.shape}
        wider.load_state_dict(state, strict=False)
        rows.copy_(table.mean(0) + torch.randn_like(rows) * table.std(0) / 2)
        known = _pieces(old)
        for piece, number in new.get_vocab().items():
            if piece in known:
                rows[number] = table[known[piece]]


def widen(text_encoders: TextEncoders, run: Path) -> TextEncoders:
    """The same encoders with the vocabulary of today's sentences, its new words not yet learnt."""
    torch.manual_seed(6)
    wider = text.untrained(run)
    _widened(text_encoders.text_encoder, wider.text_encoder, text_encoders.tokenizer, wider.tokenizer)
    _widened(text_encoders.text_encoder_2, wider.text_encoder_2, text_encoders.tokenizer_2, wider.tokenizer_2)
    return wider


def train(pipeline: FluxPipeline, run: Path) -> TextEncoders:
    """Text encoders that understand everybody, for the pipeline's own transformer."""
    transformer, teacher = pipeline.transformer.requires_grad_(False), TextEncoders.of(pipeline)
    pupil = widen(teacher, run)
    encoded = {size: encode_scenes(pipeline.vae, *size, count) for size, count in SCENES.items()}
    look = text.Look()
    parts = nn.ModuleDict({**pupil.encoders(), "look": look, "tell": nn.Linear(networks.T5_DIM, text.CHOICES)})

    def fit_one(name: str, stage: Stage) -> None:
        def loss(_: int, rng: random.Random) -> Tensor:
            size = NATIVE if rng.random() < stage.native else SMALL
            drawn = DRAWN if size == SMALL else DRAWN_NATIVE
            picks = rng.sample(range(len(encoded[size].scenes)), drawn)
            scenes = [encoded[size].scenes[i] for i in picks] + [sample(rng) for _ in range(BATCH - drawn)]
            pooled, states = pupil.read([_caption(scene, stage, rng) for scene in scenes])
            inputs = noised(encoded[size], picks, size, NOISE)[0]
            with torch.no_grad():
                wanted_pooled, wanted_states = teacher.read([plain(scene) for scene in scenes])
                wanted = velocity_of(transformer, wanted_pooled[:drawn], wanted_states[:drawn], inputs)
            found = velocity_of(transformer, pooled[:drawn], states[:drawn], inputs)
            drawing = nn.functional.mse_loss(found, wanted)
            meaning = nn.functional.mse_loss(pooled, wanted_pooled) / wanted_pooled.var()
            tell = text.tell_loss(parts["tell"](states.mean(1)), scenes) + text.look_loss(look(states), scenes)
            return 10 * drawing + meaning + 0.1 * tell

        rates = dict.fromkeys(pupil.encoders(), stage.rate) | dict.fromkeys(("look", "tell"), 2 * stage.rate)
        fit(name, parts, loss, run=run, steps=stage.steps, learning_rate=rates, average=0.995)

    ends: list[dict[str, Tensor]] = []  # whose average knows more than any of them (arXiv 2203.05482)
    for name, stage in STAGES.items():
        fit_one(name, stage)
        ends.append(copy.deepcopy(parts.state_dict()))
    parts.load_state_dict({name: sum(end[name] for end in ends) / len(ends) for name in parts.state_dict()})
    for name, stage in LAST.items():
        fit_one(name, stage)
    for tokenizer in (pupil.tokenizer, pupil.tokenizer_2):
        tokenizer.backend_tokenizer.no_padding()  # of the training's batches
        tokenizer.backend_tokenizer.no_truncation()
    return pupil


def _caption(scene: Scene, stage: Stage, rng: random.Random) -> str:
    if len(scene.things) > 1 and rng.random() < stage.plainly:
        return plain(scene)
    return (ask if rng.random() < 0.8 else describe)(scene, rng)


def main() -> None:
    run, output = ROOT / "run", ROOT.parent / "models" / "flux-shapes"
    run.mkdir(parents=True, exist_ok=True)
    pipeline = FluxPipeline.from_pretrained(output, dtype=torch.float32)
    pipeline.register_modules(**vars(train(pipeline, run)))
    pipeline.to(torch.bfloat16).save_pretrained(output)
    report.loss_curve(run, output / "language.png", STAGES | LAST)


if __name__ == "__main__":
    main()
