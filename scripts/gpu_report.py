#!/usr/bin/env python3
"""One command for whoever has the card: checks it, tests the kernels on it, measures the pair, writes a report.

    python scripts/gpu_report.py --target Qwen3.5-27B-Q4_K_M.gguf --draft Qwen3.5-27B-DFlash/
    python scripts/gpu_report.py --device cpu --quick        # the tiny pair that ships, in seconds

Writes gpu_report.md, a section to paste into RESULTS.md, and gpu_report.csv into --out. Needs the repository and what
`pip install '.[test]'` brings. Each part is a process of its own: one that fails is a sentence in the report, the
others still run, and the exit code is then 1. Ctrl-C ends it with a report of what was measured until then and exit
code 130. On a CPU the last depths take most of the time: --n-ctx 34000 leaves out those beyond 32K.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpu_parts
from gpu_parts import MIB, Row
from measuring import PARTS as STEP_PARTS
from measuring import ROOT, fingerprint, machine, table, timed, write_csv

from pydflash import models, options
from pydflash.cards import bandwidth_of


@dataclass
class Report:
    """What was asked for, and what has been found so far."""

    a: argparse.Namespace
    arguments: list[str]
    rows: dict[str, list[Row]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    interrupted: bool = False
    card: str = ""  # what nvidia-smi says of it
    bandwidth: float | None = None  # GB/s

    def floor_ms(self, n_bytes: float) -> float | None:
        """How long so many bytes take at the device's bandwidth; None when that is not known."""
        return n_bytes / (self.bandwidth * 1e6) if self.bandwidth else None


# ---- running the parts -------------------------------------------------------------------------------------------


def run_part(report: Report, part: str) -> None:
    """Runs one part in a process of its own and keeps the rows it wrote, however it ended."""
    with tempfile.TemporaryDirectory() as folder, timed(part):
        file = Path(folder) / "rows"
        command = [sys.executable, str(Path(__file__).resolve()), *report.arguments, "--kind", report.a.kind]
        quiet = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # else ggml starts a debugger on what it aborts
        command += ["--part", part, str(file)]
        # A session of its own: Ctrl-C reaches this process alone, which then ends the part and what that has started.
        with subprocess.Popen(command, env=quiet, stderr=subprocess.PIPE, start_new_session=True) as process:
            assert process.stderr is not None
            try:
                said = pass_on(process.stderr)
            except KeyboardInterrupt:
                report.interrupted = True
                end(process)
        report.rows[part] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if report.interrupted:
        report.failures.append(f"Interrupted in the part '{part}': what follows was measured until then.")
    elif process.returncode:
        last = said[-1] if said else "it said nothing"
        if process.returncode < 0:
            last = f"it was ended by {signal.Signals(-process.returncode).name} ({last})"
        report.failures.append(f"The part '{part}' failed: {last.rstrip('.')}.")


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupts a part, and kills it where that does not end it within ten seconds."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return


def pass_on(stream: IO[bytes]) -> list[str]:
    """Shows what a process says as it says it; returns its last lines."""
    text = b""
    while block := stream.read1(4096):  # type: ignore[attr-defined]  # a pipe is a BufferedReader
        sys.stderr.buffer.write(block)
        sys.stderr.flush()
        text = (text + block)[-8192:]
    return [line for line in text.decode(errors="replace").replace("\r", "\n").splitlines() if line.strip()]


def ask_driver() -> str:
    """What nvidia-smi says of the first card: name, driver, compute capability, memory. Empty without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    fields = "name,driver_version,compute_cap,memory.total,memory.free,power.limit"
    done = subprocess.run(
        [program, f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    first = done.stdout.strip().splitlines()[:1]
    return first[0] if done.returncode == 0 and first else ""


# ---- the section -------------------------------------------------------------------------------------------------


def heading(report: Report) -> str:
    """What ran where, from which files."""
    a = report.a
    found = report.rows.get("device") or [{}]
    name = found[0].get("name", "no device")
    lines = [f"### {name} ({a.kind})", f"    python scripts/gpu_report.py {' '.join(report.arguments)}".rstrip()]
    memory = f"{found[0]['free_mib']:,} of {found[0]['total_mib']:,} MiB free before the run" if found[0] else ""
    driver = "name, driver, compute capability, memory, free, power limit by nvidia-smi: " + report.card
    facts = [
        machine(),
        f"commit {commit()}" if commit() else "",
        f"ggml: {upstream()}",
        memory,
        driver if report.card else "no nvidia-smi here",
        f"memory bandwidth {report.bandwidth:.0f} GB/s" if report.bandwidth else "memory bandwidth unknown",
        f"KV cache {a.kv_type}",
    ]
    lines.append("; ".join(fact for fact in facts if fact) + ".")
    if found[0].get("why_cpu"):
        lines.append(f"The device is the CPU: {found[0]['why_cpu']}.")
    files = [(role, Path(path)) for role, path in (("target", a.target), ("drafter", a.draft))]
    shown = [(role, path.name, f"{size(path) / MIB:,.1f} MiB", fingerprint(path)) for role, path in files]
    lines.append(table(["", "file", "size", "SHA-256, first 16 digits"], shown))
    if report.failures:
        lines.append("What did not work:\n\n" + "\n".join(f"- {sentence}" for sentence in report.failures))
    return "\n\n".join(lines)


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.iterdir()) if path.is_dir() else path.stat().st_size


def commit() -> str:
    """The repository's commit, with a mark where files differ from it; empty outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def upstream() -> str:
    """The package that ggml is taken from."""
    return next(line.split()[0] for line in (ROOT / "ggml/upstream.txt").read_text().splitlines() if "==" in line)


def show_tests(report: Report, rows: list[Row]) -> str:
    (row,) = rows
    text = f"Ops on the device against float64: {row['passed']} tests passed, {row['failed']} failed, {row['skipped']} "
    text += f"skipped, {row['seconds']:.0f} s."
    if row["failed"]:
        report.failures.append(f"{row['failed']} tests of the ops failed on the device: {row['names']}.")
    return text


def show_ops(report: Report, rows: list[Row]) -> str:
    body = []
    for row in rows:
        floor = report.floor_ms(row["bytes"])
        body.append((row["op"], row["heads"], row["nodes"], f"{row['error']:.1e}", f"{row['us']:.1f}",
                     f"{floor * 1e3:.1f}" if floor else "unknown",
                     f"{100 * floor * 1e3 / row['us']:.0f}%" if floor else "-"))  # fmt: skip
    header = ["recurrent op", "heads", "nodes", "largest error", "us a layer", "floor", "of the floor's speed"]
    return table(header, body)


def show_prompts(report: Report, rows: list[Row]) -> str:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    counts = Counter(row["prompt"] for row in rows)
    rows = [row for row in rows if counts[row["prompt"]] == len(ways)]  # not the prompt at which the part ended early
    body = []
    for category in [*dict.fromkeys(row["category"] for row in rows), "all"]:
        chosen = [row for row in rows if category in (row["category"], "all")]
        plain = median(row["decode_tps"] for row in chosen if row["way"] == "plain")
        for way in ways:
            here = [row for row in chosen if row["way"] == way]
            per_pass = sum(r["n_generated"] for r in here) / sum(r["n_steps"] for r in here)
            speed = median(r["decode_tps"] for r in here)
            body.append((category if way == ways[0] else "", way, f"{per_pass:.2f}", f"{speed:.1f}",
                         f"{speed / plain:.2f}", f"{median(r['first_ms'] for r in here):.0f}"))  # fmt: skip
    text = table(["prompts", "", "tokens per pass", "tokens/s", "of plain", "first token, ms"], body)
    drafted = [row for row in rows if row["way"] != "plain"]
    margins = [row["margin"] for row in drafted if row["parted_at"] is not None]
    text += f"\n\n{len({r['prompt'] for r in rows})} prompts, greedy, {rows[0]['n_generated']} tokens each; medians. "
    text += f"{len(margins)} of {len(drafted)} drafted texts part from the plain one"
    return text + (f", where the target prefers one token by at most {max(margins):.4f}." if margins else ".")


def show_depths(report: Report, rows: list[Row]) -> str:
    ran = [row for row in rows if "refused" not in row]
    body = []
    for row in ran:
        body.append((f"{row['depth']:,}", row["way"], f"{row['prefill_tps']:.0f}", f"{row['first_ms'] / 1e3:.2f}",
                     f"{row['n_generated'] / row['n_steps']:.2f}", f"{row['decode_tps']:.1f}"))  # fmt: skip
    text = table(["depth", "", "prefill tokens/s there", "first token, s", "tokens per pass", "tokens/s"], body)
    return text + refusals(rows)


def show_breakdown(report: Report, rows: list[Row]) -> str:
    """Of the depths: the parts of a step, and the time in which the device could have moved what the step needs."""
    found = (report.rows.get("sizes") or [None])[0]
    body = []
    for row in rows:
        if "refused" in row:
            continue
        floor = report.floor_ms(row["floor_bytes"])
        parts = [f"{row[f'{part}_ms']:.2f}" for part in STEP_PARTS]
        over = [f"{floor:.2f}", f"{row['step_ms'] / floor:.2f}"] if floor else ["unknown", "-"]
        body.append((f"{row['depth']:,}", row["way"], *parts, f"{row['step_ms']:.2f}", *over))
    text = table(["depth", "", *(f"{part} ms" for part in STEP_PARTS), "step ms", "floor ms", "over the floor"], body)
    if found:
        text += (
            f"\n\nMedians of the steps. The floor moves {found['verify'] / MIB:,.0f} MiB of target weights, "
            f"{found['state'] / MIB:,.1f} MiB of recurrent state, {found['kv_per_token']:,} bytes of KV cache for each "
            f"token of depth and, when drafting, {found['draft'] / MIB:,.0f} MiB of drafter and head; "
            "then logits, masks and what the tree leaves for its commit."
        )
    return text


def show_memory(report: Report, rows: list[Row]) -> str:
    ran = [row for row in rows if "refused" not in row]
    body = [(row["what"], f"{row['mib']:,.1f}", row.get("how", "")) for row in ran]
    text = table(["memory", "MiB", ""], body) + refusals(rows)
    if report.a.kind == "cpu":
        text += "\n\nOn the CPU weights are mapped files; what was taken is this process's anonymous memory."
    return text


def refusals(rows: list[Row]) -> str:
    """Contexts that the device had no room for."""
    return "".join(f"\n\nn_ctx {r['n_ctx']:,} was refused: {r['refused']}." for r in rows if "refused" in r)


SHOWN: dict[str, Callable[[Report, list[Row]], str]] = {
    "tests": show_tests,
    "ops": show_ops,
    "prompts": show_prompts,
    "depths": show_depths,
    "memory": show_memory,
}


def write(report: Report) -> None:
    """The CSV and the section, whose fingerprints take a while."""
    report.a.out.mkdir(parents=True, exist_ok=True)
    write_csv(report.a.out / "gpu_report.csv", [{"part": p, **row} for p, rows in report.rows.items() for row in rows])
    sections = []
    for part, show in SHOWN.items():
        rows = report.rows.get(part)
        if rows:
            sections.append(show(report, rows))
        if part == "depths" and any("refused" not in row for row in rows or []):
            sections.append(show_breakdown(report, rows or []))
    text = "\n\n".join([heading(report), *sections]) + "\n"
    (report.a.out / "gpu_report.md").write_text(text)
    print(text)


# ---- command line ------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    about, _, details = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        description=about, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--target", metavar="GGUF", help="default: the tiny pair that ships with pydflash")
    p.add_argument("--draft", metavar="PATH", help="its DFlash drafter: a GGUF, or a folder as z-lab lays it out")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    p.add_argument("--kv-type", default="q4_0", metavar="TYPE", help="default: q4_0, with which 128K fits into 24 GB")
    p.add_argument("--n-ctx", type=int, metavar="N", help="no deeper than N tokens (default: the model's own limit)")
    p.add_argument("--n-threads", type=int, metavar="N", help="of the CPU; default: one a core")
    p.add_argument("--bandwidth", type=float, metavar="GB/s", help="of the device's memory (default: by its name)")
    p.add_argument("--prompts", type=Path, default=ROOT / "pydflash/bench/prompts.json", help=argparse.SUPPRESS)
    p.add_argument("--only", nargs="+", choices=gpu_parts.PARTS, help="these parts alone")
    p.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    p.add_argument("--quick", action="store_true", help="few tests, short texts, small depths")
    p.add_argument("--kind", default="cpu", help=argparse.SUPPRESS)  # what the device turned out to be
    p.add_argument("--part", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    a = p.parse_args(arguments)
    if not set(a.kv_type.split(",")) <= set(options.KV_TYPES):
        p.error(f"--kv-type is {a.kv_type}; it must be one of {', '.join(options.KV_TYPES)}, or two of them: K,V")
    if a.target and not a.draft:
        p.error("--target goes with --draft: half of what is measured is drafting")
    if not a.target:
        a.target, a.draft = str(models.target_path()), str(a.draft or models.draft_path())
    return a


def main(arguments: list[str]) -> int:
    a = parse_arguments(arguments)
    if a.part:
        return gpu_parts.run(a.part[0], a, Path(a.part[1]))
    for path in (a.target, a.draft):
        if not Path(path).exists():
            print(f"error: {path} does not exist", file=sys.stderr)
            return 2
    report = Report(a, arguments, card=ask_driver())
    if a.device == "cuda":
        a.kind = "cuda"
    run_part(report, "device")
    if report.rows["device"]:
        a.kind = report.rows["device"][0]["kind"]
        report.bandwidth = a.bandwidth or bandwidth_of(report.rows["device"][0]["name"])
    for part in [part for part in gpu_parts.PARTS if part != "device" and (not a.only or part in a.only)]:
        if not report.interrupted:
            run_part(report, part)
    with timed("fingerprints of the files, and the report"):
        write(report)
    return 130 if report.interrupted else 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
