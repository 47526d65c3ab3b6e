"""The benchmark of cards: a row for every way whatever happens, figures that are kept, machines that lack packages."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

from benchmarks import bare, gpu, gpu_bench, gpu_profile, readme
from benchmarks.full_size import _without_weights
from benchmarks.gpu import Budget, attempt, run
from benchmarks.gpu_bench import Bench, block_calls, published_rate
from benchmarks.gpu_results import OtherMachine, Results, words
from benchmarks.gpu_ways import AS_SERVED, PLAIN, WAYS, LeftOut, Way, chosen, with_references
from deploy import plan
from src.engine.lora import AdapterFile, Networks
from src.errors import InvalidSettings
from src.settings import ROOT, Settings
from tests.small_models import small

CPU = {"card": "none", "torch": "2.13.0", "diffusers": "0.42.1", "cores": 2}
H100 = {**CPU, "card": "NVIDIA H100 80GB HBM3", "cores": 26}
DEV = "FLUX.1-dev"


class FakeBench:
    """Takes `seconds` for each way, and raises what `failures` has for it; `broken` once it has failed."""

    def __init__(self, failures: dict[str, BaseException] | None = None, *, seconds: float = 10) -> None:
        self.failures = failures or {}
        self.seconds = seconds
        self.broken = False
        self.now = 0.0
        self.drawn: list[str] = []

    def facts(self) -> dict[str, Any]:
        return {"steps": 28, "floor_seconds": {"product": 2.6, "published": 2.1, "published_fp8": 1.4}}

    def measure(self, way: Way) -> dict[str, Any]:
        self.now += self.seconds
        self.drawn.append(way.name)
        if way.name in self.failures:
            raise self.failures[way.name]
        return {"way": way.name, "seconds": 5.6, "seconds_per_step": 0.2, "steps": way.steps or 28}

    def works(self) -> bool:
        return not self.broken

    def clock(self) -> float:
        return self.now


def measured(bench: FakeBench, file: Path, *ways: str, minutes: float | None = None) -> dict[str, dict[str, Any]]:
    """The rows of a run of `ways` on an H100, as the file has them."""
    results = Results(file, H100, full_size=True)
    run(lambda _: bench, DEV, chosen(ways), results, Budget(minutes, bench.clock))
    return {row["way"]: row for row in json.loads(file.read_text())["models"][DEV]["ways"]}


# ---- a row for every way


@pytest.mark.parametrize(
    "failure",
    [
        InvalidSettings("no such kernel"),
        RuntimeError("CUDA error: an illegal\nmemory access"),
        MemoryError(),
        GeneratorExit(),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_way_that_fails_is_a_row_that_says_why(failure: BaseException, tmp_path: Path) -> None:
    rows = measured(FakeBench({AS_SERVED: failure}), tmp_path / "gpu.json")
    assert list(rows) == [way.name for way in WAYS]
    assert rows[AS_SERVED]["error"] == words(failure)
    assert "\n" not in rows[AS_SERVED]["error"]
    assert all("seconds" in row for name, row in rows.items() if name != AS_SERVED)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_stops_it_stops_it(stop: type[BaseException], tmp_path: Path) -> None:
    bench, file = FakeBench({WAYS[3].name: stop()}), tmp_path / "gpu.json"
    with pytest.raises(stop):
        measured(bench, file)
    assert [row["way"] for row in json.loads(file.read_text())["models"][DEV]["ways"]] == [way.name for way in WAYS[:3]]


def test_what_a_way_wants_and_this_machine_lacks_is_named() -> None:
    way = Way("+ fp8")
    missing = ModuleNotFoundError("No module named 'torchao'", name="torchao")
    lacking = attempt(FakeBench({way.name: missing}), way)
    assert lacking == {"way": "+ fp8", "left_out": "it wants torchao, which this machine does not have"}
    assert (
        attempt(FakeBench({way.name: LeftOut("its streams want a card")}), way)["left_out"] == "its streams want a card"
    )


def test_a_device_that_computes_no_more_draws_no_other_way(tmp_path: Path) -> None:
    bench = FakeBench({AS_SERVED: RuntimeError("CUDA error: unspecified launch failure")})
    bench.broken = True
    rows = measured(bench, tmp_path / "gpu.json")
    assert bench.drawn == [way.name for way in WAYS[:4]]
    assert "error" in rows[AS_SERVED]
    assert (
        rows["fast"]["left_out"]
        == f"the device failed while it drew '{AS_SERVED}', and computes nothing in this process"
    )


def test_a_model_that_cannot_be_made_hinders_no_other(tmp_path: Path) -> None:
    def make(name: str) -> FakeBench:
        raise MemoryError("34 GB")

    results = Results(tmp_path / "gpu.json", H100, full_size=True)
    assert run(make, DEV, WAYS, results, Budget(None)) is None
    assert {row["left_out"] for row in results.rows(DEV)} == {"the model could not be made: MemoryError: 34 GB"}
    assert len(results.rows(DEV)) == len(WAYS)


# ---- within a time


def test_no_way_is_begun_that_would_take_longer_than_what_is_left(tmp_path: Path) -> None:
    bench = FakeBench(seconds=25)
    rows = measured(bench, tmp_path / "gpu.json", minutes=1)
    assert bench.drawn == [way.name for way in WAYS[:2]], "the third is expected to take as long as those"
    assert rows[WAYS[2].name]["left_out"] == "--minutes: 10 seconds were left, and it is expected to take 25"
    assert len(rows) == len(WAYS)


def test_a_way_that_was_seen_to_take_long_is_not_begun_where_less_is_left(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    measured(FakeBench(seconds=100), file, "balanced")
    bench = FakeBench(seconds=10)
    rows = measured(bench, file, "balanced", "fast", minutes=1.8)
    assert bench.drawn == [PLAIN, "fast"]
    assert rows["balanced"]["took_seconds"] == 100, "and its figures stay"


def test_a_second_run_begins_with_what_has_no_figures(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    measured(FakeBench(seconds=25), file, minutes=1)
    bench = FakeBench(seconds=1)
    measured(bench, file)
    assert bench.drawn == [PLAIN, *(way.name for way in WAYS[2:]), WAYS[1].name], (
        "the plain one is what all are held against"
    )


# ---- the file


def test_rows_of_other_ways_and_models_stay(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    measured(FakeBench(), file, "fast")
    results = Results(file, H100, full_size=True)
    run(lambda _: FakeBench(), "FLUX.1-schnell", chosen(["within*"]), results, Budget(None))
    rows = measured(FakeBench({"fast": RuntimeError("no")}), file, "balanced", "fast")
    assert list(rows) == [PLAIN, "balanced", "fast"]
    assert rows["fast"]["error"] == "RuntimeError: no", "what it gave last counts"
    schnell = json.loads(file.read_text())["models"]["FLUX.1-schnell"]
    assert [row["way"] for row in schnell["ways"]] == [
        *(PLAIN, AS_SERVED),
        *(f"within {cap} GB" for cap in (24, 16, 18, 12)),
    ]
    assert list(tmp_path.iterdir()) == [file], "no half-written one"


def test_figures_of_two_cards_are_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    Results(file, H100, full_size=True).write()
    Results(file, {**H100, "cores": 8}, full_size=True)
    for other in ({**H100, "card": "NVIDIA H200"}, {**H100, "torch": "2.11.0"}, CPU):
        with pytest.raises(
            OtherMachine, match=re.escape(f"{file} holds figures of NVIDIA H100 80GB HBM3 with torch 2.13.0")
        ):
            Results(file, other, full_size=other is not CPU)


def test_figures_without_a_card_give_way(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    before = Results(file, CPU, full_size=False)
    before.keep("flux-shapes", {"way": PLAIN, "seconds": 0.1})
    assert Results(file, CPU, full_size=False).row("flux-shapes", PLAIN)
    assert Results(file, {**CPU, "torch": "2.14.0"}, full_size=False).rows("flux-shapes") == []
    assert Results(file, H100, full_size=True).found["models"] == {}


# ---- the table of ways


def test_patterns_choose_ways_and_one_that_fits_none_is_refused() -> None:
    assert chosen([]) == WAYS
    assert [way.name for way in chosen(["one adapter*"])] == ["one adapter", "one adapter, compiled"]
    with pytest.raises(ValueError, match="'fsat' fits no way; there are plain diffusers, "):
        chosen(["fsat"])


def test_each_way_is_held_against_one_that_was_drawn_before_it() -> None:
    names = [way.name for way in WAYS]
    assert len(set(names)) == len(names)
    for place, way in enumerate(WAYS):
        assert way.against is None or names.index(way.against) <= place
        assert not way.adapters or way.against != PLAIN


def test_what_a_way_is_held_against_is_drawn_too() -> None:
    drawn = [way.name for way in with_references(chosen(["within 12 GB", "fast"]), measured={"fast", PLAIN})]
    assert drawn == [PLAIN, AS_SERVED, "within 12 GB", "fast"]


def test_deploy_names_the_way_that_a_worker_takes_and_the_image_has_this_allocator() -> None:
    assert plan._AS_SERVED == AS_SERVED
    assert f"PYTORCH_CUDA_ALLOC_CONF={gpu.ALLOCATOR} " in (ROOT / "Dockerfile").read_text()


def test_floors_are_of_the_card_that_a_data_sheet_is_about() -> None:
    assert published_rate("NVIDIA H100 80GB HBM3") == 989e12
    assert published_rate("NVIDIA H100 PCIe") is None, "a slower one of the same row"
    assert published_rate("NVIDIA GeForce RTX 2080") is None


# ---- one model


@pytest.fixture(scope="module")
def shapes() -> Bench:
    return Bench("flux-shapes")


def test_rows_have_what_was_measured_and_what_was_expected(shapes: Bench) -> None:
    plain, ours = (shapes.measure(replace(way, against=PLAIN)) for way in chosen([PLAIN, "within 12 GB"]))
    assert plain["seconds"] > 0
    assert plain["max_difference"] == 0
    assert (plain["attention"], ours["attention"]) == ("native", "native")
    assert ours["max_difference"] == 0
    assert ours["placement"]["mode"] == "stream"
    assert ours["predicted_peak_gb"] == ours["placement"]["expected_peak_gb"], "the CPU has no context"
    assert ours["predicted_seconds_per_step"] > 0
    facts = shapes.facts()
    assert facts["steps"] == 8
    assert facts["floor_seconds"]["product"] > 0
    assert facts["floor_seconds"]["published"] is None


def test_adapters_count_and_are_held_against_the_same_adapters(shapes: Bench) -> None:
    (way,) = chosen(["one adapter"])
    row = shapes.measure(way)
    assert "max_difference" not in row
    shapes.measure(WAYS[0])
    assert (shapes._first[way.name] != shapes._first[PLAIN]).any()


@pytest.mark.parametrize("family", ["dev", "klein"])
def test_adapters_of_random_numbers_are_read_by_the_worker(family: str, tmp_path: Path, shapes: Bench) -> None:
    from src.engine import load_engine

    pipeline = load_engine(Settings(model_name=str(small(family, tmp_path / "model"))))._pipeline
    bench = object.__new__(Bench)
    bench._pipeline, bench.device, bench.dtype = pipeline, torch.device("cpu"), torch.float32
    bench._folder = shapes._folder
    (adapter,) = bench._adapters(Way("one", adapters=(3,)))
    file = AdapterFile(adapter.file, Networks(pipeline, Settings()))
    file.check()
    assert file.warnings == ()
    adapter.file.unlink()


def test_settings_that_this_worker_has_not_are_left_out_by_name(shapes: Bench) -> None:
    with pytest.raises(LeftOut, match="no setting PROFILER"):
        shapes.measure(Way("later", {"profiler": "near"}))
    with pytest.raises(LeftOut, match="wants torchae and left-pad"):
        shapes.measure(Way("lacking", wants=("torchae", "left-pad")))
    if not torch.cuda.is_available():
        with pytest.raises(LeftOut, match="want a card"):
            shapes.measure(Way("group", diffusers="block_level"))


def test_what_ran_eager_is_counted_whatever_was_asked_for(shapes: Bench) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.single_transformer_blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in [*self.transformer_blocks, *self.single_transformer_blocks]:
                x = block(x)
            return x

    blocks, x = Blocks().requires_grad_(False), torch.ones(2, 4)
    assert block_calls(blocks, lambda: blocks(x)) == (4, 0)
    for block in blocks.transformer_blocks:
        block.forward = torch.compile(block.forward, backend="eager")
    blocks(x)
    assert block_calls(blocks, lambda: [blocks(x), blocks(x)]) == (8, 6)
    with torch.compiler.set_stance("force_eager"):
        assert block_calls(blocks, lambda: blocks(x)) == (4, 0)


def test_a_way_that_fell_back_says_so_and_is_not_published_as_compiled(shapes: Bench) -> None:
    torch._dynamo.reset()
    (way,) = chosen(["one adapter"])
    claims = Way("claims to be compiled", way.settings, compiled=True)
    row = shapes.measure(claims)
    assert row["fell_back"] == "14 of 14 calls of blocks ran eager"
    assert "(ran eager)" in readme._on_card({**row, "peak_gb": 33.9})


def test_ways_share_weights_and_change_none_of_each_other_s(shapes: Bench) -> None:
    copied, own = shapes._copy(), shapes._pipeline
    weight = own.transformer.proj_out.weight
    assert copied.transformer.proj_out.weight is not weight
    assert copied.transformer.proj_out.weight.data_ptr() == weight.data_ptr()
    assert copied.tokenizer is own.tokenizer
    assert copied.scheduler is not own.scheduler
    copied.transformer.to(torch.bfloat16)
    assert weight.dtype == torch.float32


def test_memory_is_the_allocator_s_and_the_context_s(shapes: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    placement = shapes.prepare(chosen(["*resident"])[0]).placement
    assert placement
    bench = object.__new__(Bench)
    bench.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 34_000_000_000)
    monkeypatch.setattr(gpu_bench, "context_memory", lambda _: 500_000_000)
    memory = bench._memory(replace(placement, peak=33_700_000_000))
    assert (memory["peak_gb"], memory["context_gb"], memory["predicted_peak_gb"]) == (34.5, 0.5, 34.2)


# ---- where a step's time goes


@pytest.mark.slow
def test_a_step_s_time_is_shared_out(shapes: Bench, tmp_path: Path) -> None:
    file = tmp_path / "gpu_profile.json"
    gpu_profile.keep(shapes, file, CPU)
    found = json.loads(file.read_text())["models"]["flux-shapes"]
    for name in gpu_profile.PROFILED:
        shares = found[name]["share"]
        assert {"products", "attention", "waiting"} <= shares.keys()
        assert sum(shares.values()) == pytest.approx(1, abs=0.02)
        assert found[name]["seconds_per_step"] > 0
        assert 0 < len(found[name]["largest"]) <= 12


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3i_128x128x128", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("triton_poi_fused_add_gelu_mul_0", "norms, gates, activations"),
        ("aten::addmm", "products"),
        ("aten::mul", "norms, gates, activations"),
    ],
)
def test_kernels_are_known_by_their_names(kernel: str, kind: str) -> None:
    assert gpu_profile.kind_of(kernel) == kind


def test_kernels_and_copies_that_overlap_count_once() -> None:
    assert gpu_profile.union([(5, 9), (0, 4), (1, 3), (8, 10)]) == 9
    assert gpu_profile.union([]) == 0


# ---- the docs' table


def test_a_card_s_table_says_what_failed_and_what_was_expected() -> None:
    row = {
        "seconds_per_step": 0.15,
        "steps": 28,
        "peak_gb": 34.6,
        "predicted_peak_gb": 34.1,
        "predicted_seconds_per_step": 0.16,
    }
    ways = [
        {"way": PLAIN, "seconds": 6.6, **row, "predicted_peak_gb": None},
        {"way": AS_SERVED, "seconds": 4.2, **row},
        {"way": "one adapter, compiled", "seconds": 7.1, **row, "fell_back": "114 of 114 calls of blocks ran eager"},
        {"way": "within 12 GB", "error": "DoesNotFit: its weights take ..."},
        {"way": "fast", "error": "RuntimeError: no"},
        {"way": "nf4", "left_out": "it wants bitsandbytes, which this machine does not have"},
        {"way": "diffusers' sequential offload", "seconds": 6.0, **row, "seconds_per_step": 3.0, "steps": 2},
    ]
    table = readme.gpu({"machine": H100, "full_size": True, "models": {DEV: {**FakeBench().facts(), "ways": ways}}})
    for line in (
        f"| {PLAIN} | 6.60, 34.6 GB |",
        f"| {AS_SERVED} | 4.20, 34.6 GB |",
        "| one adapter, compiled | 7.10, 34.6 GB (ran eager) |",
        "| within 12 GB | does not fit |",
        "| fast | failed |",
        "| nf4 | not measured yet |",
        "| diffusers' sequential offload | 3.00 a step, 34.6 GB |",
        f"| {AS_SERVED} | 150 ms | 160 ms | 34.6 GB | 34.1 GB |",
        f"The floor of 28 steps of {DEV}: 2.60 s by a warm product, 2.10 s by the card's data sheet, 1.40 s in 8 bits.",
    ):
        assert line in table.splitlines()


def test_a_step_s_table_has_the_floor_and_the_shares() -> None:
    row = {"seconds_per_step": 0.15, "share": {"products": 0.7, "attention": 0.2, "waiting": 0.05}, "largest": []}
    models = {DEV: {"floor_seconds_per_step": {"product": 0.094, "published": 0.076}, AS_SERVED: row}}
    lines = readme.gpu_profile({"machine": H100, "models": models}).splitlines()
    assert f"| {DEV}, {AS_SERVED} | 150.0 | 94.0 | 70 % | 20 % | 0 % | 0 % | 5 % |" in lines
    assert "94.0" not in readme.gpu_profile({"machine": CPU, "models": models}), "of no card"


# ---- machines that lack packages


def test_layers_are_made_without_memory_for_weights_but_with_their_buffers() -> None:
    with _without_weights():
        shared = nn.Embedding(3, 2)
        tied = nn.Linear(2, 3, bias=False)
        tied.weight = shared.weight
        norm = nn.BatchNorm1d(2)
    assert tied.weight is shared.weight
    assert shared.weight.is_meta
    assert not norm.running_mean.is_meta  # type: ignore[union-attr]
    assert not nn.Linear(2, 2).weight.is_meta


def needed(*packages: str) -> set[Path]:
    """The files and folders of site-packages that `packages` and all that they require have."""
    found, ahead, seen = set[Path](), list(packages), set[str]()
    while ahead:
        name = re.sub(r"[-_.]+", "-", ahead.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            each = distribution(name)
        except PackageNotFoundError:
            continue
        site = Path(str(each.locate_file("")))
        found |= {site / file.parts[0] for file in each.files or () if file.parts[0] not in ("..", "__pycache__")}
        wanted = [Requirement(text) for text in each.requires or ()]
        ahead += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Site-packages with torch, transformers, diffusers and pydantic, and what they bring."""
    folder = tmp_path_factory.mktemp("bare")
    for file in needed("torch", "transformers", "diffusers", "pydantic"):
        (folder / file.name).symlink_to(file)
    assert not any(
        (folder / name).exists() for name in ("peft", "accelerate", "psutil", "brotli", "torchao", "matplotlib")
    )
    return folder


def started(packages: list[Path], output: Path, *arguments: str) -> subprocess.Popen[str]:
    """`python -m benchmarks.gpu`, with `packages` alone where they are given."""
    python = [sys.executable, *(["-S"] if packages else []), "-m", "benchmarks.gpu"]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(map(str, packages))}
    return subprocess.Popen(
        [*python, "--output", str(output), *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_torch_transformers_and_diffusers_are_enough_to_run_it(bare_machine: Path, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    process = started([bare_machine], output, "--ways", "*resident", "one adapter", "+ fp8", "nf4", "*model offload")
    _, said = process.communicate()
    assert process.returncode == 0, said[-2000:]
    rows = {row["way"]: row for row in json.loads(output.read_text())["models"]["flux-shapes"]["ways"]}
    assert rows[PLAIN]["seconds"] > 0
    lacking = {name: row.get("left_out") for name, row in rows.items() if name != PLAIN}
    assert lacking == {
        name: f"it wants {package}, which this machine does not have"
        for name, package in {
            "this worker, everything resident": "psutil",
            "+ attention by the card": "psutil",
            "+ fp8": "torchao",
            "one adapter": "peft",
            "diffusers' model offload": "accelerate",
            "nf4": "bitsandbytes",
        }.items()
    }
    assert "no plot without matplotlib" in said


@pytest.mark.slow
def test_without_pydantic_it_says_so_in_a_line(bare_machine: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for file in bare_machine.iterdir():
        if file.name != "pydantic":
            (fewer / file.name).symlink_to(file)
    process = started([fewer], tmp_path / "gpu.json")
    _, said = process.communicate()
    assert process.returncode == 1
    assert said.splitlines()[-1] == "benchmarks.gpu wants pydantic, which this machine does not have"


@pytest.mark.slow
def test_with_psutil_the_ways_of_this_worker_run_too(bare_machine: Path, tmp_path: Path) -> None:
    more, output = tmp_path / "more", tmp_path / "gpu.json"
    more.mkdir()
    for file in needed("psutil"):
        (more / file.name).symlink_to(file)
    process = started([bare_machine, more], output, "--ways", "*resident", "within 12 GB")
    _, said = process.communicate()
    assert process.returncode == 0, said[-2000:]
    rows = json.loads(output.read_text())["models"]["flux-shapes"]["ways"]
    assert [row.get("max_difference") for row in rows] == [0, 0, 0, 0], rows


@pytest.mark.slow
def test_killed_at_any_way_it_leaves_the_rows_before(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    ways = ["*resident", "+ attention*", "within*", "adaptive*", "*model offload", "nf4"]
    process = started([], output, "--ways", *ways)
    drawn, last = 0, random.randint(1, 6)
    assert process.stderr
    for line in process.stderr:
        drawn += line.startswith("flux-shapes {")
        if drawn == last:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    rows = json.loads(output.read_text())["models"]["flux-shapes"]["ways"]
    assert len(rows) in (last, last + 1)
    assert PLAIN in [row["way"] for row in rows]


def test_stand_ins_are_for_src_alone_and_fail_when_they_are_called() -> None:
    source = "from no_such_package.inside import Thing\n"
    names: dict[str, Any] = {"__name__": "src.engine.adapters", "__builtins__": __builtins__}
    with bare.without_needless_packages("no_such_package"):
        exec(source, names)  # noqa: S102
        with pytest.raises(ModuleNotFoundError):
            exec(source, {**names, "__name__": "diffusers.loaders"})  # noqa: S102
    thing = names["Thing"]
    assert not isinstance(1, thing)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        thing()
    assert issubclass(thing.error, Exception), "it may stand in an except"
    with pytest.raises(ModuleNotFoundError):
        exec(source, names)  # noqa: S102


def test_ten_minutes_says_which_runs_there_are() -> None:
    script = ROOT / "benchmarks" / "ten_minutes.sh"
    found = subprocess.run(["/bin/sh", str(script)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (2, "which run: 1 or 2?\n")
    run_1 = ["/bin/sh", str(script), "1", "gpu.json"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "echo"}
    said = subprocess.run(run_1, env=environment, capture_output=True, text=True, check=True).stdout
    assert said == "-m benchmarks.gpu --minutes 9.5 --output gpu.json --models FLUX.1-dev\n"
