"""A program that its compiler refuses for its memory: its words, and the plan made of it."""

import json
import re
import subprocess
from pathlib import Path

import jax
import pytest
import recorded

from jaxlm import cli, configfile
from jaxlm.hardware.target import Target, parse_target
from jaxlm.plan import compiled, cost, overflow, page, plan, report

TINY = Path(__file__).parent / "configs" / "llama.yaml"
G = 2**30
# Word for word: the first of libtpu 0.0.4x for v5e, v6e, v4 and (llama3-8b) TPU7x; then of XLA's
# page on E1000 (openxla.org/xla/errors/error_1000), and of reports on older versions.
E1000 = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries ({}) exceeds available HBM ({}). HLO module: jit_train_step.\n"
    "See https://openxla.org/xla/errors/error_1000 for more details."
)
OLD = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
MESSAGES = {
    E1000.format("16.99G", "15.75G"): (16.99 * G, 15.75 * G),
    E1000.format("44.75G", "31.24G"): (44.75 * G, 31.24 * G),
    E1000.format("195.07G", "30.75G"): (195.07 * G, 30.75 * G),
    E1000.format("127.79G", "94.74G"): (127.79 * G, 94.74 * G),
    E1000.format("1.20T", "15.75G"): (1.2 * 1024 * G, 15.75 * G),
    OLD + "Used 49.34G of 32.00G hbm. Exceeded hbm capacity by 17.34G.": (49.34 * G, 32 * G),
    OLD + """Used 63.80G of 30.75G hbm. Exceeded hbm capacity by 33.05G.

Total hbm usage >= 65.05G:
    reserved          1.25G
    program          63.80G
    arguments            0B
""": (63.8 * G, 30.75 * G),
    "RESOURCE_EXHAUSTED: TPU TensorCore Hbm usage: 34.82G, SparseCore Hbm usage 174.10G, exceeding "
    "available bytes: 95.74G": ((34.82 + 174.1) * G, 95.74 * G),
    "Compilation failure: Aborting compilation early because it's unlikely to have enough device "
    "memory. Requires 90.12G, has 31.25G available. If more detailed logging is desired, set":
    (90.12 * G, 31.25 * G),
}  # fmt: skip
OTHER = (
    "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem "
    "while allocating on stack for %my-custom-kernel = bf16[2048,4096]{1,0:T(8,128)(2,1)}",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space smem. "
    "Used 1.00M of 1.00M smem. Exceeded smem capacity by 1.7K.",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.",
    "INVALID_ARGUMENT: No such compile option: 'x'",
)


@pytest.mark.parametrize("message", MESSAGES)
def test_what_the_compiler_needs_is_read_from_its_words(message):
    found = overflow.read_message(message)
    assert found is not None and found[:2] == pytest.approx(MESSAGES[message])
    assert "\n" not in found.message and found.message.split() == message.split()


@pytest.mark.parametrize("message", OTHER)
def test_other_failures_are_no_refusals(message):
    """Another memory, or an allocation: what the program needs is not known."""
    assert overflow.read_message(message) is None
    error = RuntimeError(message)
    with pytest.raises(RuntimeError) as raised:
        overflow.explain(None, error)
    assert raised.value is error


class Refused:
    """A train step that the compiler refuses as libtpu did when it was recorded."""

    def lower(self):
        return self

    def compile(self, options: dict):
        found = recorded.record(recorded.REFUSED)
        if folder := (options or {}).get("xla_dump_to"):
            Path(folder, "m.tpu.after_optimizations.txt").write_text(found.text)
        raise jax.errors.JaxRuntimeError(found.refusal)


@pytest.fixture
def refusing(monkeypatch):
    """The worker of a plan in this process, without libtpu."""

    def work(path: Path, target: Target, timeout: float):
        made = compiled.report(configfile.load(path), target.text)
        return subprocess.CompletedProcess([], 0, json.dumps(made), "")

    monkeypatch.setattr(Target, "devices", Target.absent_devices)
    monkeypatch.setattr(compiled, "trace_train_step", lambda *_: Refused())
    monkeypatch.setattr(compiled, "_run_worker", work)


def test_a_refused_program_has_a_plan(tmp_path, capsys, refusing):
    """The table, the buffers, --json and --html of what libtpu refuses; kept, with exit code 1."""
    source = recorded.SOURCES[recorded.REFUSED]
    arguments = [
        "plan", str(recorded.ROOT / source.path), f"target={source.target}", *source.overrides,
        f"plan.cache={tmp_path}/cache",
    ]  # fmt: skip
    assert cli.main([*arguments, "--json", "--html", f"{tmp_path}/p.html"]) == 1
    found = json.loads(capsys.readouterr().out)
    memory, refused = found["memory"], found["memory"]["refused"]
    assert found["method"] == "compiled" and not found["cached"] and not memory["fits"]
    assert 15.7 * G < refused["available_bytes"] < 15.8 * G < refused["needed_bytes"] < 20 * G
    assert memory["peak_bytes"] == pytest.approx(refused["needed_bytes"])
    assert sum(memory["classes"].values()) == pytest.approx(memory["peak_bytes"])
    assert abs(memory["classes"]["unexplained"]) < 0.01 * memory["peak_bytes"]  # to its rounding
    assert memory["traced_bytes"] > 1e9
    # A row of 8 floats is padded to 128: what the trace does not show.
    assert {"bytes": 5000 * 256 * 4 * 128 * 4, "shape": "f32[5000,256,4,8]"}.items() <= (
        found["largest"][0].items()
    )
    assert found["flops"]["ratio"] > 1 and found["step"]["seconds"] > 0 and found["collectives"]
    assert "CompileTimeHbmOom" in found["warnings"][-1]
    html = (tmp_path / "p.html").read_text()
    assert cli.main(arguments) == 1  # from the cache, in seconds
    out = capsys.readouterr().out
    for text in (out, html):
        for words in ("the compiler refuses the program: it needs 18.2 GB of 16.9 GB",
                      "the trace says", "DOES NOT FIT", "f32[5000,256,4,8]"):  # fmt: skip
            assert words in text
    assert "from the cache" in out


def test_a_refusal_without_a_program_is_planned_by_its_trace(tmp_path, monkeypatch):
    """Where the compiler stopped too early to leave a schedule."""
    config = configfile.load(TINY, ["mesh.fsdp=8", f"plan.cache={tmp_path}"])
    target = parse_target("cpu:8")
    said = overflow.read_message(next(iter(MESSAGES)))
    assert said is not None
    result = {
        "attention": "xla", "trace_seconds": 1.0, "compile_seconds": 1.0, "code_bytes": 0.0,
        "peak_bytes": said.needed_bytes, "cost": None, "warnings": [], "largest": [],
        "cached": False, "refused": said._asdict(),
    }  # fmt: skip
    monkeypatch.setattr(compiled, "measure", lambda *_: result)
    made = plan.make_plan(config, target, analytic=False)
    traced = plan.make_plan(config, target, analytic=True)
    assert not made.fits and made.cost.peak == pytest.approx(said.needed_bytes)
    assert made.cost.flops == traced.cost.flops and made.traced == traced.cost.peak
    assert "all but the memory it needs is from its trace" in made.warnings[-1]
    found = plan.to_dict(made)
    assert re.search("needs 18.2 GB of 16.9 GB", "".join(report.head(found)))
    assert "needs 18.2 GB of 16.9 GB" in page.page(found)
    measured = plan.measure_seconds(config, target)
    assert measured["peak_bytes"] == pytest.approx(said.needed_bytes) and measured["refused"]
    # Far from the trace, what it leaves unexplained may be below zero: then it has no bar.
    below = found["memory"] | {"classes": {"unexplained": -1e9}}
    assert "width:0.00%" in page.page(found | {"memory": below})


@pytest.mark.parametrize("text", [
    "[" * 200_000, '{"cost": 1}', '{"cost": null, "refused": null}', '{"refused": {}, "cost": {}}',
])  # fmt: skip
def test_a_damaged_result_in_the_cache_is_compiled_again(tmp_path, monkeypatch, text):
    config = configfile.load(TINY, ["mesh.fsdp=8", f"plan.cache={tmp_path}"])
    target = parse_target("cpu:8")
    taken = plan.make_plan(config, target, analytic=True).cost
    good = {
        "attention": "xla", "trace_seconds": 1.0, "compile_seconds": 1.0, "code_bytes": 0.0,
        "peak_bytes": 1.0, "cost": cost.to_json(taken), "warnings": [], "largest": [],
        "refused": None,
    }  # fmt: skip
    done = subprocess.CompletedProcess([], 0, json.dumps(good), "")
    runs = []
    monkeypatch.setattr(compiled, "_run_worker", lambda *_: runs.append(1) or done)
    assert not compiled.measure(config, target)["cached"]
    assert compiled.measure(config, target)["cached"] and len(runs) == 1
    (kept,) = tmp_path.glob("compiled-*.json")
    kept.write_text(text)
    assert not compiled.measure(config, target)["cached"] and len(runs) == 2
    assert compiled.measure(config, target)["cached"]
