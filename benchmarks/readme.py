"""The tables of docs/performance.md and the README's figures, made from the results; `make docs` puts them there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_ways import AS_SERVED

RESULTS = Path(__file__).parent / "results"


def serving(results: dict[str, Any]) -> str:
    """How busy the device is, what is lost, and how fast a response is made."""
    rows = {(row["seconds"], row["way"]): row for row in results["device"]}
    lines = ["| one job | device busy: plain | this worker | jobs a second: plain | this worker | jobs in hand |"]
    lines.append("| --- " * 6 + "|")
    for seconds in dict.fromkeys(seconds for seconds, _ in rows):
        plain, ours = rows[seconds, "plain"], rows[seconds, "ours"]
        lines.append(
            f"| {f'{seconds:g} s' if seconds else 'flux-shapes'} "
            f"| {plain['busy_percent']:.0f} % | {ours['busy_percent']:.0f} % "
            f"| {plain['jobs_per_second']:.2f} | {ours['jobs_per_second']:.2f} | {ours['most_in_hand']} |"
        )
    lines += ["", "| requests to RunPod that fail | results lost: plain | this worker |", "| --- | --- | --- |"]
    lost = {(row["fault_rate"], row["way"]): row for row in results["lost"]}
    for rate in dict.fromkeys(rate for rate, _ in lost):
        plain, ours = lost[rate, "plain"], lost[rate, "ours"]
        lines.append(f"| {100 * rate:.0f} % | {plain['lost']} of {plain['jobs']} | {ours['lost']} of {ours['jobs']} |")
    assembly, start, machine = results["assembly"], results["start"]["median_seconds"], results["machine"]
    lines += [
        "",
        f"Four photographs of 1024x1024 become a response in {1000 * assembly['seconds']['ours']:.0f} ms; Pillow's",
        f"PNG, one after another, takes {1000 * assembly['seconds']['plain']:.0f} ms (same pixels). From a process's",
        f"start to its first result: {start['ours']:.1f} s, plain {start['plain']:.1f} s. All of it by",
        f"`python -m benchmarks.serving` on {machine['cores']} cores without a card, both ways in one run.",
    ]
    return "\n".join(lines)


def fleet(results: dict[str, Any]) -> str:
    """Several workers on one endpoint, by pattern."""
    rows = {(row["pattern"], row["way"]): row for row in results["rows"]}
    ways = list(dict.fromkeys(way for _, way in rows))
    lines = [f"| jobs | {' | '.join(f'{way}: all done, 95 % within' for way in ways)} | its jobs by worker |"]
    lines.append("| --- " * (len(ways) + 2) + "|")
    for pattern in dict.fromkeys(pattern for pattern, _ in rows):
        cells = [
            f"{rows[pattern, way]['makespan_seconds']:.1f} s, {rows[pattern, way]['p95_seconds']:.1f} s" for way in ways
        ]
        ours = rows[pattern, ways[0]]
        shares = ", ".join(map(str, ours["jobs_by_worker"]))
        lines.append(f"| {pattern} ({ours['jobs']}) | {' | '.join(cells)} | {shares} |")
    machine = results["machine"]
    lines += [
        "",
        f"`python -m benchmarks.serving --workers {results['workers']}` on {machine['cores']} cores without a card,",
        "all ways in one run; requests to RunPod take 50 ms each way.",
    ]
    return "\n".join(lines)


def faults(results: dict[str, Any]) -> str:
    """What becomes of jobs when requests fail."""
    lines = ["| requests to RunPod that fail | jobs | one result each | lost | more than one |", "| --- " * 5 + "|"]
    for row in results["rates"]:
        jobs = row["jobs"] - row["with_a_killed_worker"]
        counts = f"{jobs} | {row['one_result']} | {row['lost']} | {row['more_than_one']}"
        lines.append(f"| {row['percent_of_requests']} % | {counts} |")
    return "\n".join(lines)


def encoding(results: dict[str, Any]) -> str:
    """Each library's fastest way to write a photograph, beside Pillow's default."""
    ways, kinds = results["ways"], ("photographs", "shapes")
    measured = [row for row in ways if row["photographs"]]
    by_speed = sorted(measured, key=lambda row: row["photographs"]["ms"])
    fastest = {row["library"]: row for row in reversed(by_speed)}
    rows = [ways[0], *(row for row in by_speed if row is fastest[row["library"]])]
    lines = ["| each library's fastest way | photograph | size | flat shapes | size |", "| --- " * 5 + "|"]
    for row in rows:
        cells = [f"{row[kind]['ms']:.1f} ms | {row[kind]['of_pillow']:.2f}" for kind in kinds]
        lines.append(f"| {row['way']} | {' | '.join(cells)} |")
    missing = dict.fromkeys(row["library"] for row in ways if row["library"] not in fastest)
    lines += (f"| {library} |{' not measured yet |' * 4}" for library in missing)
    (ours,) = (row for row in ways if row["library"] == "this worker")
    first = next(row for row in by_speed if row["exact"] and row["library"] not in ("not compressed", "this worker"))
    times = ours["photographs"]["ms"] / first["photographs"]["ms"]
    lines += [
        "",
        f"One picture of {results['side']}x{results['side']} on one thread; sizes are shares of Pillow's default.",
        "All but JPEG and AVIF are exact: decoded and compared. The fastest exact library that compresses a photograph",
        f"is {first['way']}; this worker, with the request in the file, takes {times:.2f} times as long.",
        "",
        "| a decoded tensor becomes a picture | diffusers | bytes first | planes first |",
        "| --- | --- | --- | --- |",
    ]
    for row in results["assembly"]:
        cells = [f"{ms:.1f} ms" for ms in row["ms"].values()]
        lines.append(f"| {row['dtype']} on {row['device']} | {' | '.join(cells)} |")
    response = results["response"]
    lines += [
        "",
        "All three give the same bytes; the last two round to bytes where the tensor is, numpy or Pillow interleaves",
        f"the colours. For {response['pictures']} photographs the files take",
        f"{response['ms']['files']:.0f} ms one after another, base64 {response['ms']['base64']:.0f} ms and the",
        f"response's JSON {response['ms']['json']:.0f} ms. All of it by `python -m benchmarks.encoding` on",
        f"{results['machine']['cores']} cores, all ways in one run.",
    ]
    return "\n".join(lines)


def ledger(results: dict[str, Any]) -> str:
    """What fits with which model on each card, and how much longer a picture takes then."""
    models: dict[str, Any] = results["models"]
    columns = [
        (model, demand)
        for model in ("FLUX.1-dev", "FLUX.2-klein-9B", "FLUX.2-dev")
        for demand in next(found for found in models[model].values() if found)
    ]
    lines = [
        f"| card | {' | '.join(f'{model}: {demand}' for model, demand in columns)} |",
        "| --- " * (1 + len(columns)) + "|",
    ]
    for card in models["FLUX.1-dev"]:
        cells = [_with_model(models[model][card], demand) for model, demand in columns]
        lines.append(f"| {card} | {' | '.join(cells)} |")
    lines += [
        "",
        "How long a picture takes with it, modelled, in times of the model alone; in bold what did not fit while the",
        "placement of the start stayed. Counted byte by byte by `python -m benchmarks.ledger`, without a card.",
    ]
    return "\n".join(lines)


def _with_model(found: dict[str, Any] | None, demand: str) -> str:
    if not found:
        return "no room for the model"
    if found[demand]["times_as_long"] is None:
        return "no room"
    times = f"{found[demand]['times_as_long']:.2f}"
    return times if found[demand]["fits_the_placement_of_the_start"] else f"**{times}**"


def adapters(results: dict[str, Any]) -> str:
    """How far an adapter's answers are from the truth in bfloat16, by the way in which it is applied."""
    ways = list(next(iter(results["linear"].values())))
    lines = [f"| rank | {' | '.join(ways)} |", "| --- " * (1 + len(ways)) + "|"]
    lines += [
        f"| {rank} | {' | '.join(f'{row[way]:.4f}' for way in ways)} |" for rank, row in results["linear"].items()
    ]
    decibels = ", ".join(f"{way} {value} dB" for way, value in results["pictures"].items())
    lines += [
        "",
        "A linear of 3072 to 12288 features in bfloat16, held against its merged weights in float64: the norm of the",
        f"difference in norms of what the adapter adds; the slot's rank is {results['slot']}. Pictures of the shipped",
        f"adapter in bfloat16, held against float32: {decibels} (`python -m benchmarks.adapters`).",
    ]
    return "\n".join(lines)


def single_files(results: dict[str, Any]) -> str:
    """What each type of weights loses, on the shipped transformer."""
    lines = ["| weights | bytes of the file | matrices are off by | pictures |", "| --- | --- | --- | --- |"]
    for row in results["types"]:
        decibels = f"{row['decibels']} dB" if row["decibels"] else "the same bytes"
        lines.append(f"| {row['type']} | {row['file_bytes']:,} | {100 * row['matrices']:.2f} % | {decibels} |")
    lines += [
        "",
        "The shipped transformer as one file of each type: the norm of what its matrices lost, in their norms, and",
        f"{results['pictures']} pictures held against those of its folder (`python -m benchmarks.single_files`).",
        "Q2_K to Q6_K: not measured yet.",
    ]
    return "\n".join(lines)


_NEVER = "not measured yet"
_FEW = 2  # steps, of a way whose whole picture would take minutes


def gpu(results: dict[str, Any]) -> str:
    """Seconds and memory of each way on a card, and what the same script shows without one."""
    models, full_size = results["models"], results["full_size"]
    cards = {name: {row["way"]: row for row in found["ways"]} for name, found in models.items() if full_size}
    shipped = {row["way"]: row for found in models.values() for row in found["ways"] if not full_size}
    names = list(cards) or ["FLUX.1-dev", "FLUX.1-schnell", "FLUX.2-klein-4B"]
    ways = dict.fromkeys(row["way"] for found in models.values() for row in found["ways"])
    heads = [f"{name}: s, GB" for name in names] + (["flux-shapes, no card: off by"] if shipped else [])
    lines = [f"| 1024x1024 | {' | '.join(heads)} |", "| --- " * (1 + len(heads)) + "|"]
    for way in ways:
        cells = [_on_card(cards.get(name, {}).get(way)) for name in names]
        if shipped:
            cells.append(_without_card(shipped[way]))
        lines.append(f"| {way} | {' | '.join(cells)} |")
    machine = results["machine"]
    lines += [
        "",
        f"`python -m benchmarks.gpu` on {machine['cores']} cores, card: {machine['card']}, torch {machine['torch']};",
        "medians of up to three pictures, each of a new prompt. GB are those of the card at the peak, CUDA's context",
        'among them; "ran eager" is a way whose blocks did not run compiled, though that was asked for. Pictures are',
        "held against plain diffusers'; what saves memory against the same way with everything resident, adapters",
        "compiled and in fp8 against the same ones eager.",
    ]
    for name in cards:
        lines += ["", *_predicted(name, models[name])]
    if shipped:
        lines += [
            "Without a card it pretends cards as narrow for flux-shapes as those are for FLUX.1-dev, and no compiler",
            "is at work: that shows how far pictures are from what they are held against, not how fast a card is.",
        ]
    return "\n".join(lines)


def _on_card(row: dict[str, Any] | None) -> str:
    """Seconds and gigabytes, or in a word or two why there are none."""
    if row is None or "left_out" in row:
        return _NEVER
    if "error" in row:
        return "does not fit" if row["error"].startswith("DoesNotFit") else "failed"
    took = f"{row['seconds']:.2f}" if row["steps"] > _FEW else f"{row['seconds_per_step']:.2f} a step"
    memory = f", {row['peak_gb']:.1f} GB" if row.get("peak_gb") is not None else ""
    return f"{took}{memory}{' (ran eager)' if 'fell_back' in row else ''}"


def _without_card(row: dict[str, Any]) -> str:
    """How far the picture is from the one that it is held against."""
    if "left_out" in row:
        return "wants a card" if "card" in row["left_out"] else _NEVER
    if "error" in row:
        return "not to be had on this processor"
    apart = row.get("max_difference")
    return "not compared" if apart is None else f"{apart:.0f} of 255"


def _predicted(name: str, found: dict[str, Any]) -> Iterator[str]:
    """What the placement expected beside what was measured, and what a step takes at least."""
    floor = {kind: seconds for kind, seconds in found["floor_seconds"].items() if seconds}
    words = {"product": "by a warm product", "published": "by the card's data sheet", "published_fp8": "in 8 bits"}
    yield f"| {name} | a step: measured | predicted | peak: measured | predicted |"
    yield "| --- " * 5 + "|"
    for row in found["ways"]:
        if "seconds" in row and row["predicted_peak_gb"]:
            yield (
                f"| {row['way']} | {1000 * row['seconds_per_step']:.0f} ms "
                f"| {1000 * row['predicted_seconds_per_step']:.0f} ms "
                f"| {row['peak_gb']:.1f} GB | {row['predicted_peak_gb']:.1f} GB |"
            )
    least = ", ".join(f"{seconds:.2f} s {words[kind]}" for kind, seconds in floor.items())
    yield ""
    yield f"The floor of {found['steps']} steps of {name}: {least}."


def gpu_profile(results: dict[str, Any]) -> str:
    """Where the time of a step goes on a card, and what it takes at least."""
    kinds = ("products", "attention", "norms, gates, activations", "copies", "waiting")
    lines = [f"| a step | ms | at least | {' | '.join(kinds)} |", "| --- " * (3 + len(kinds)) + "|"]
    on_card = results["machine"]["card"] != "none"
    for name, found in results["models"].items() if on_card else ():
        least = found["floor_seconds_per_step"]["product"]
        for way, row in found.items():
            if "share" in row:
                shares = [f"{100 * row['share'].get(kind, 0):.0f} %" for kind in kinds]
                cells = [f"{1000 * row['seconds_per_step']:.1f}", f"{1000 * least:.1f}", *shares]
                lines.append(f"| {name}, {way} | {' | '.join(cells)} |")
    if not on_card:
        lines.append(f"| FLUX.1-schnell |{f' {_NEVER} |' * (2 + len(kinds))}")
    lines += [
        "",
        "`python -m benchmarks.gpu --profile`, in the worker's own loop; at least: products and attention at the rate",
        "of a warm product. Kernels of two streams overlap; waiting is when the device does nothing, and torch's",
        "profiler adds to it.",
    ]
    return "\n".join(lines)


def cpu(results: dict[str, Any]) -> str:
    """How far each way is from the plain one, and where the seconds of a start go."""
    lines = ["| way | largest difference | PSNR: mean | least | seconds: plain | this way |", "| --- " * 6 + "|"]
    for name, row in results["ways"].items():
        if "missing" in row:
            lines.append(f"| {name} |{' not to be had on this processor |' * 5}")
            continue
        decibels = [f"{row[key]:.0f} dB" if row[key] else "exact" for key in ("psnr_mean", "psnr_least")]
        times = row["seconds"]
        lines.append(
            f"| {name} | {row['largest_difference']:.0f} of 255 | {decibels[0]} | {decibels[1]} "
            f"| {times['plain']:.2f} | {times['way']:.2f} |"
        )
    spent = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in results["start"].items())
    lines += [
        "",
        f"flux-shapes in float32 over {results['prompts']} prompts, on {results['machine']['cores']} cores",
        "(`python -m benchmarks.cpu`); guessed steps save time wherever they are, smaller weights only on cards.",
        f"A start there: {spent}.",
    ]
    return "\n".join(lines)


def cold_start(results: dict[str, Any]) -> str:
    """How long a start waits for weights on a network volume, by way."""
    ways, volume = results["ways"], results["volume"]
    least = min(found["wait_seconds"] for found in ways.values())
    lines = ["| weights on a slow volume | waits after torch's import | times as long | cached at most |"]
    lines.append("| --- " * 4 + "|")
    for way, found in ways.items():
        wait = found["wait_seconds"]
        lines.append(f"| {way} | {wait:.2f} s | {wait / least:.1f} | {found['most_in_cache'] / 1e6:.0f} MB |")
    megabytes, rate = results["bytes"] / 1e6, volume["bytes_per_second_of_a_connection"] / 1e6
    lines += [
        "",
        f"{megabytes:.0f} MB behind a file that sleeps {1000 * volume['latency_seconds']:.1f} ms a request, and as",
        f"long as its bytes take at {rate:.0f} MB/s of each connection; the import of torch and diffusers is real.",
        f"`python -m benchmarks.cold_start`, medians of {results['rounds']} starts each on",
        f"{results['machine']['cores']} cores. From RunPod's volumes, and to cards: not measured yet.",
    ]
    return "\n".join(lines)


def soak(results: dict[str, Any]) -> str:
    """What a worker holds after more and more jobs of all kinds."""
    waves = results["waves"]
    shown = {wave["jobs"]: wave for wave in (*waves[:: max(1, len(waves) // 6)], waves[-1])}
    heads = ("jobs", "memory", "handles", "threads", "in hand: median", "95 % within")
    lines = [
        f"| {' | '.join(heads)} |",
        "| --- " * len(heads) + "|",
        *(
            f"| {wave['jobs']:,} | {wave['megabytes']:.0f} MB | {wave['handles']} | {wave['threads']} "
            f"| {wave['median_seconds']:.2f} s | {wave['p95_seconds']:.2f} s |"
            for wave in shown.values()
        ),
    ]
    holds = [name for name, found in results["checks"].items() if not found]
    fails = [name for name, found in results["checks"].items() if found]
    lines += [
        "",
        f"Held: {'; '.join(holds)}." if holds else "Nothing held.",
        *([f"Failed: {'; '.join(fails)}."] * bool(fails)),
    ]
    lines += [
        f"{results['jobs']:,} jobs of {len(results['ends'])} kinds in {results['seconds'] / 60:.0f} minutes, by",
        f"`python -m benchmarks.soak` on {results['machine']['cores']} cores without a card.",
    ]
    return "\n".join(lines)


def hostile(results: dict[str, Any]) -> str:
    """What requests that are meant to hurt cost, by kind."""
    heads = ("what was sent", "cases", "longest until its answer", "most memory", "honest jobs later by")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for kind, cases in results["kinds"].items():
        seconds, megabytes, delay = (
            max(case[key] for case in cases.values()) for key in ("seconds", "megabytes", "honest_delay")
        )
        lines.append(f"| {kind} | {len(cases)} | {seconds:.2f} s | {megabytes:.0f} MB | {delay:.2f} s |")
    lines += [
        "",
        f"`python -m benchmarks.hostile` on {results['machine']['cores']} cores without a card. Servers that drip or",
        "say nothing are waited for until 30 seconds are over, and nobody else waits; all others are answered at once.",
    ]
    return "\n".join(lines)


def generated(results: dict[str, Any]) -> str:
    """How requests made at random are answered."""
    answers = ", ".join(f"{code} {count:,}" for code, count in results["answers"].items())
    first, last = results["megabytes"]
    return "\n".join(
        [
            f"{results['requests']:,} requests made at random (any JSON; what the schema takes; such with one or two",
            f"places changed), planned or described: {answers}; the slowest took {results['slowest_seconds']:.2f} s,",
            f"memory is {first:.0f} MB after a tenth of them and {last:.0f} MB at the end",
            "(`python -m benchmarks.generated`).",
        ]
    )


def batch(results: dict[str, Any]) -> str:
    """What the client asks of RunPod, what becomes of rows when all sorts of things fail, and its memory."""
    lines = ["| jobs | calls a job: this client | RunPod's own client | seconds: this client | RunPod's |"]
    lines.append("| --- " * 5 + "|")
    for row in results["calls"]:
        each = [f"{row[way]['calls'] / row['jobs']:.1f}" for way in ("ours", "runpod")]
        seconds = [f"{row[way]['seconds']:.0f} s" for way in ("ours", "runpod")]
        lines.append(f"| {row['jobs']} of {row['seconds_a_job']:g} s | {' | '.join([*each, *seconds])} |")
    killed, (few, *_, many) = results["killed"], results["memory"]
    same = "the same as" if killed["files_as_local"] else "others than"
    faults = f"{killed['faults_of_the_client']} faults of the client's requests"
    above = f"{killed['calls_above_the_limits']} above RunPod's limits"
    memory = f"{many['megabytes']} MB at {many['rows']:,} ({many['megabytes_of_pictures']} MB of pictures)"
    lines += [
        "",
        f"{killed['rows']} rows by the real worker, with {faults},",
        f"{killed['faults_of_the_worker']} of the worker's, a kill -9 in the middle and a resume:",
        f"{killed['pictures']} pictures, {killed['errors']} errors ({killed['expected_errors']} rows were wrong),",
        f"{killed['paid_twice']} jobs paid twice but for {killed['never_known']} whose ids never came;",
        f"{killed['calls_a_job']:g} calls a job, {above}; the files are",
        f"{same} those of `--local`, byte for byte. The client held {few['megabytes']} MB at {few['rows']:,} rows and",
        f"{memory}. All of it by `python -m benchmarks.batch`",
        f"on {results['machine']['cores']} cores, {results['concurrency']} jobs open at a time.",
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "serving": serving,
    "fleet": fleet,
    "faults": faults,
    "batch": batch,
    "encoding": encoding,
    "gpu": gpu,
    "gpu_profile": gpu_profile,
    "ledger": ledger,
    "adapters": adapters,
    "single_files": single_files,
    "cpu": cpu,
    "cold_start": cold_start,
    "soak": soak,
    "hostile": hostile,
    "generated": generated,
}


def table(name: str) -> str:
    """A row of TABLES, of the results as they are."""
    return TABLES[name](_results(name))


def figures() -> str:
    """What a stranger wants to know first, a line each, beside RunPod's plain handler."""
    serving, fleet, faults, card = map(_results, ("serving", "fleet", "faults", "gpu"))
    busy = {row["way"]: f"{row['busy_percent']:.0f} %" for row in serving["device"] if row["seconds"] == 0.3}
    lost = {row["way"]: f"{row['lost']} of {row['jobs']}" for row in serving["lost"] if row["fault_rate"] == 0.2}
    spent = {row["way"]: f"{row['makespan_seconds']:.1f} s" for row in fleet["rows"] if row["pattern"] == "short"}
    jobs = next(row["jobs"] for row in fleet["rows"] if row["pattern"] == "short")
    assembly = {way: f"{1000 * seconds:.0f} ms" for way, seconds in serving["assembly"]["seconds"].items()}
    faulty = max(faults["rates"], key=lambda row: float(row["percent_of_requests"]))
    lines = ["| | this worker | a plain handler |", "| --- | --- | --- |"]
    for what, found in (
        ("the device is busy, with jobs of 0.3 s", busy),
        ("results lost where 20 % of the requests to RunPod fail", lost),
        ("four photographs of 1024x1024 become a response", assembly),
    ):
        lines.append(f"| {what} | {found['ours']} | {found['plain']} |")
    ours, *_, plain = spent.values()
    ways = card["models"]["FLUX.1-dev"]["ways"] if card["full_size"] else []
    served = next((way for way in ways if way["way"] == AS_SERVED), None)
    answered = f"{faulty['one_result']} of {faulty['jobs'] - faulty['with_a_killed_worker']}"
    lines += [
        f"| {jobs} short jobs over {fleet['workers']} workers are done | {ours} | {plain} |",
        "",
        f"With {faulty['percent_of_requests']} % of the requests to RunPod failing, {answered} jobs got one result",
        f"each. FLUX.1-dev of full size, 1024x1024 on a card: {_on_card(served)}.",
    ]
    return "\n".join(lines)


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())
