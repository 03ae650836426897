"""The command that prints the paper's tables: counts, jobs, failures, pages; nothing is timed."""

import json
import pathlib
import subprocess
import sys
import time
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import pytest

import repvgg_jax as rv

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(FOLDER))

import convolutions  # noqa: E402
import harness  # noqa: E402
import models_page  # noqa: E402
import paper  # noqa: E402
import paper_report  # noqa: E402
import paper_rows  # noqa: E402
import paper_tables  # noqa: E402
from baselines import BASELINES, cost  # noqa: E402
from baselines.linen import Baseline  # noqa: E402


def _parse(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", *flags])
    return paper_tables.parse()


def _jobs(args, device="cpu"):
    return list(paper_tables.jobs_of(args, list(args.rows), device))


def _result(speed=10.0):
    spread = {"median": speed, "min": speed / 2, "max": 2 * speed}
    return {"images_per_second": spread, "ratio": spread, "memory_mib": 300.0}


@pytest.mark.parametrize("deploy", [False, True])
def test_counted_macs_of_a_classifier_are_those_of_cost(deploy):
    """Groups and strides included; the classifier is no convolution."""
    model = rv.create_model("B1g4", num_classes=0, deploy=deploy, lowering="plain")
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    counted = convolutions.count(jax.jit(model.apply), variables, images).macs
    expected = rv.cost("B1g4", image_size=64, num_classes=0)
    assert counted == (expected.macs_deploy if deploy else expected.macs_train)


@pytest.mark.parametrize("table", ["4", "5"])
def test_our_counts_are_the_printed_ones(table):
    """To the printed digit: parameters truncated, except EfficientNet-B3's, multiplications."""
    found = paper_tables.counts()
    for row, printed in paper.TABLES[table].rows.items():
        params, macs = found[row]["params_deploy"], found[row]["macs"]
        if row != "EfficientNet-B3":
            params -= params % 10**4
        assert f"{params / 1e6:.2f}" == printed.params
        assert f"{macs / 1e9:.1f}" == printed.macs


def test_counts_cover_every_network():
    found = paper_tables.counts()
    assert found.keys() == {*rv.VARIANTS, *BASELINES}
    assert found["A0"]["params_train"] == 9_108_968
    assert found["A0"]["params_deploy"] == 8_309_384
    assert found["EfficientNet-B3"]["image_size"] == 300
    assert all(type(value) is int for each in found.values() for value in each.values())


@pytest.mark.parametrize("name", ["ResNet-18", "EfficientNet-B0"])
def test_the_program_has_the_counted_multiplications(name):
    """What is counted from the parts is in the program that JAX traces from them."""
    network = BASELINES[name]
    model = Baseline(network, deploy=True, lowering="plain")
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    dense = sum(
        leaf["kernel"].size for leaf in variables["params"].values() if "kernel" in leaf
    )  # matrix products are not convolutions
    found = convolutions.count(model.apply, variables, image)
    assert found.macs == cost(network).macs_deploy - dense
    assert found.winograd == cost(network).winograd_muls - dense


def test_dilated_convolutions_do_without_winograd():
    def run(x, kernel, dilation):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", rhs_dilation=(dilation,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    x, kernel = jnp.zeros((2, 4, 4, 3)), jnp.zeros((3, 3, 3, 5))
    macs = 2 * 4 * 4 * 5 * 27
    assert convolutions.count(lambda a, b: run(a, b, 1), x, kernel) == (macs, macs * 4 // 9)
    assert convolutions.count(jax.jit(lambda a, b: run(a, b, 2)), x, kernel) == (macs, macs)


def test_every_row_is_a_network():
    for table in set(paper.TABLES) - {"8"}:
        for row in (*paper.TABLES[table].rows, paper.TABLES[table].reference):
            network = paper.network_of(table, row, channels=8)
            variant = paper.variant_of(table, row)
            if variant:
                assert cost(network).params_deploy == rv.cost(variant).params_deploy
    assert paper.variant_of("6", "B0 converted") == "B0"
    assert paper.variant_of("6", "B0") is None


def test_jobs_follow_the_flags(monkeypatch):
    args = _parse(monkeypatch, "--table", "4", "--rows", "A0", "ResNet-18", "--runners", "JAX")
    jobs = _jobs(args)
    assert [job["row"] for job in jobs if "runner" in job] == ["A0", "ResNet-18"]
    assert {job["ahead"] for job in jobs if "ahead" in job} == {"v5e", "h100"}
    cases = {(job["batch"], job["dtype"]) for job in _jobs(args, "gpu") if "runner" in job}
    assert cases == {(b, d) for b in (128, 256) for d in ("float32", "bfloat16")}


def test_rows_are_found_by_other_spellings(monkeypatch):
    args = _parse(monkeypatch, "--table", "4", "--rows", "RepVGG-A0", "resnet-18")
    assert args.rows == ["A0", "ResNet-18"]


def test_counts_of_rows_of_a_table(monkeypatch, capsys):
    flags = ["--counts", "--table", "4", "--rows", "resnet-18", "RepVGG-A0"]
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", *flags])
    paper_tables.main()
    assert list(json.loads(capsys.readouterr().out)) == ["ResNet-18", "A0"]


def test_a_folder_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["--counts", "--json", str(tmp_path / "file" / "counts.json")]
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", *flags])
    with pytest.raises(SystemExit, match=r"error: .*file"):
        paper_tables.main()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--table", "4", "--rows", "RestNet-18"], ["RestNet-18", "ResNet-18"]),
        (["--table", "9"], ["9"]),
        (["--json", "x.json"], ["--table", "--counts"]),
        (["--table", "4", "--json", "x.json"], ["--counts"]),
        (["--table", "8", "--counts"], ["8", "4 and 5"]),
        (["--table", "4", "--batch", "0"], ["0"]),
        (["--table", "4", "--rounds", "x"], ["x"]),
        (["--table", "4", "--timeout", "-1"], ["-1"]),
    ],
)
def test_bad_flags_are_refused(monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        _parse(monkeypatch, *flags)
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert all(word in message for word in words)


def test_a_rerun_continues_and_tries_again_what_failed(monkeypatch, tmp_path, capsys):
    flags = ("--table", "4", "--rows", "A0", "ResNet-18", "--runners", "JAX", "--ahead")
    args = _parse(monkeypatch, *flags)
    jobs = _jobs(args)
    done = []

    def fake(job, timeout):
        done.append(job["row"])
        return {"error": "boom"} if job["row"] == "A0" and len(done) == 1 else _result()

    monkeypatch.setattr(paper_tables, "do", fake)
    paper_tables.work(jobs, paper_tables.Store(tmp_path, "4"), timeout=1)
    printed = capsys.readouterr().out
    assert "FAILED: boom" in printed
    assert "[2/2] ResNet-18" in printed
    assert "left" in printed
    paper_tables.work(jobs, paper_tables.Store(tmp_path, "4"), timeout=1)
    assert done == ["A0", "ResNet-18", "A0"]
    # Other versions are other results.
    now = harness.versions()
    monkeypatch.setattr(harness, "versions", lambda: now | {"torch": "another", "libtpu": "0"})
    assert paper_tables.Store(tmp_path, "4").has(jobs[0])  # which depends on neither
    monkeypatch.setattr(harness, "versions", lambda: {"python": now["python"]})
    assert paper_tables.Store(tmp_path, "4").has(jobs[0])  # measured where JAX is installed
    monkeypatch.setattr(harness, "versions", lambda: now | {"jax": "another"})
    assert not paper_tables.Store(tmp_path, "4").has(jobs[0])
    monkeypatch.setattr(harness, "versions", lambda: now)
    here = harness.hardware()
    monkeypatch.setattr(harness, "hardware", lambda: here | {"cores": 99})
    assert not paper_tables.Store(tmp_path, "4").has(jobs[0])  # timed on another machine


def test_a_line_cut_short_does_not_lose_the_others(monkeypatch, tmp_path):
    (job, *_) = _jobs(_parse(monkeypatch, "--table", "4", "--rows", "A0"))
    store = paper_tables.Store(tmp_path, "4")
    store.add(job, _result())
    with store.path.open("a") as file:
        file.write('\n{"job": {"ro')  # the process ended while it wrote
    again = paper_tables.Store(tmp_path, "4")
    assert again.has(job)
    again.add(job | {"row": "A1"}, _result())
    assert paper_tables.Store(tmp_path, "4").has(job | {"row": "A1"})


def _records(monkeypatch, table, *flags):
    args = _parse(monkeypatch, "--table", table, *flags)
    args.rows = args.rows or list(paper.TABLES[table].rows)
    machine = {"cpu": "a processor", "cores": 2, "gpu": None, "load_average": [0.5, 0.4, 0.3]}
    origin = {"versions": {}, "date": "2026-01-02", "commit": "abc1234", "machine": machine}
    return [{"job": job, "result": _result(), **origin} for job in _jobs(args)]


def test_the_page_reports_what_failed(monkeypatch, tmp_path):
    records = _records(monkeypatch, "4", "--rows", "A0", "ResNet-18", "--runners", "JAX")
    for record in records:
        if "ahead" in record["job"]:
            record["result"] = {"error": "no compiler"}
    records[-1]["result"] = {"gb": 1.25, "kernels": 42, "compile_s": 1.0}
    records[0]["result"] = {"error": "not done after 5 s"}
    text = paper_report.write(tmp_path, "4", ["A0", "ResNet-18"], records).read_text()
    assert "72.41" in text
    assert "3256" in text
    assert "| A0        | failed" in text
    assert "10 (5 to 20)" in text
    assert "a processor" in text
    assert "abc1234" in text
    assert "JAX: not done after 5 s (A0)" in text
    assert "1.25" in text
    assert "42" in text


@pytest.mark.parametrize("table", ["4", "5", "6"])
def test_the_picture_exists_in_light_and_dark(monkeypatch, tmp_path, table):
    records = _records(monkeypatch, table, "--runners", "JAX", "--ahead")
    page = paper_report.write(tmp_path, table, list(paper.TABLES[table].rows), records)
    images = [tmp_path / f"table{table}-{mode}.svg" for mode in ("light", "dark")]
    for image in images:
        assert image.name in page.read_text()
        drawn = "".join(xml.etree.ElementTree.parse(image).getroot().itertext())
        assert all(row in drawn for row in paper.TABLES[table].rows)
    assert images[0].read_text() != images[1].read_text()


def test_density_counts_two_flop_per_mac(monkeypatch, tmp_path):
    flags = ("--rows", "3x3", "--runners", "JAX", "--channels", "64", "--ahead")
    page = paper_report.write(tmp_path, "1", ["3x3"], _records(monkeypatch, "1", *flags))
    text = page.read_text()
    assert f"| {2 * 9 * 64 * 64 * 56 * 56 * 10 / 1e12:.3g} " in text  # 10 images/s
    assert "198.8" in text
    assert "38.10" in text


def test_segmenters_are_compiled_for_gpus_without_triton():
    for table, wanted in (("4", False), ("8", True)):
        environment = paper_rows.environment_ahead({"table": table, "ahead": "h100"})
        assert ("triton_gemm=false" in environment["XLA_FLAGS"]) == wanted
    on_tpu = paper_rows.environment_ahead({"table": "8", "ahead": "v5e"})
    assert "triton" not in str(on_tpu)


def test_what_a_framework_raises_is_the_error(monkeypatch):
    (job, *_) = _jobs(_parse(monkeypatch, "--table", "4", "--rows", "A0"))

    def raises(row, job):
        raise RuntimeError(f"no memory for {row}\nand more")

    monkeypatch.setattr(paper_rows, "runner", raises)
    run, error = paper_rows.build("A0", job)
    assert error == "RuntimeError: no memory for A0 and more"

    def both(build, names, arguments, **_):
        return {name: [0.1] for name in names}, {name: build(name, job)[1] for name in names}

    monkeypatch.setattr(harness, "take_turns_apart", both)
    assert paper_rows.measure(job) == {"error": error}
    assert run() is None


def test_a_crash_is_an_error(monkeypatch):
    (job, *_) = _jobs(_parse(monkeypatch, "--table", "4", "--rows", "A0"))
    monkeypatch.setattr(harness, "take_turns_apart", lambda *_, **__: ({}, {}))
    assert "crashed" in paper_rows.measure(job)["error"]


@pytest.mark.parametrize("kind", ["onnxruntime", "OpenVINO", "PyTorch"])
def test_every_framework_runs(kind):
    """A batch goes through what is timed, in this process."""
    if reason := paper_rows.not_measurable("1", kind):
        pytest.skip(reason)
    job = {"table": "1", "runner": kind, "batch": 2, "dtype": "float32", "image_size": 9}
    run = paper_rows.runner("3x3", job | {"channels": 4, "device": "cpu"})
    result = run()
    assert result is None or result.shape == (2, 4)


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(paper_rows.torch_peer, "installed", lambda name: name != "openvino")
    assert "openvino" in paper_rows.not_measurable("4", "OpenVINO")
    assert paper_rows.not_measurable("4", "onnxruntime") is None
    assert "JAX" in paper_rows.not_measurable("8", "PyTorch")
    assert paper_rows.not_measurable("8", "JAX as trained") is None
    assert "8" in paper_rows.not_measurable("4", "JAX as trained")


def test_table_8_has_both_forms(monkeypatch):
    jobs = _jobs(_parse(monkeypatch, "--table", "8", "--rows", "B2-fast", "--ahead"))
    assert [job["runner"] for job in jobs] == ["JAX", "JAX as trained"]
    for device in ("cpu", "gpu"):
        assert "JAX as trained" not in paper_rows.runners_of("4", device)
    trained, fused = (paper_rows.segmenter_of("B2-fast", deploy=form) for form in (False, True))
    assert (trained.deploy, fused.deploy) == (False, True)
    assert trained.auxiliary_width == fused.auxiliary_width == 0


@pytest.mark.system
def test_a_program_that_hangs_ends_with_its_processes(tmp_path):
    """Beyond the limit the whole group of processes is killed, not the first one alone."""
    script = tmp_path / "hangs.py"
    script.write_text(
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    found = harness.in_subprocess(str(script), {}, timeout=5)
    assert "5 s" in found["error"]
    child = pathlib.Path("/proc", (tmp_path / "pid").read_text(), "stat")
    until = time.monotonic() + 60  # a busy machine takes a while to end a process
    while child.exists() and child.read_text().split()[2] not in "ZX":
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.system
def test_the_error_of_a_program_is_what_it_raised(tmp_path):
    """Not the last line, if a message has several."""
    script = tmp_path / "fails.py"
    script.write_text("raise ValueError('batch 7 does not fit\\nsuspected location:\\n  here')\n")
    assert "ValueError: batch 7" in harness.in_subprocess(str(script), {}, timeout=60)["error"]
    script.write_text("import sys; sys.exit('just this')\n")
    assert "just this" in harness.in_subprocess(str(script), {}, timeout=60)["error"]


def test_the_page_of_models_is_up_to_date():
    """Otherwise run `python benchmarks/models_page.py`."""
    assert models_page.PAGE.read_text() == models_page.page()


def test_the_page_of_models_names_every_network():
    lines = models_page.page().splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    assert rows.keys() >= {*rv.VARIANTS, *BASELINES}
    for name in rv.VARIANTS:
        found = rv.cost(name)
        assert f"{found.params_train:,}" in rows[name]
        assert f"{found.params_deploy:,}" in rows[name]
        assert "official" in rows[name]
    assert "not at all" not in rows["A0"]
    assert models_page._loaded(()) == "not at all"
    assert models_page.TIMM.keys() == BASELINES.keys()


@pytest.mark.system
def test_counts_are_written_by_one_command(tmp_path):
    command = [sys.executable, str(FOLDER / "paper_tables.py"), "--counts", "--json", "counts.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "counts.json").read_text())
    assert written == paper_tables.counts()


@pytest.mark.slow
def test_a_table_from_end_to_end(tmp_path):
    """Two small rows, timed and reported."""
    command = [
        sys.executable, str(FOLDER / "paper_tables.py"), "--table", "4", "--rows", "A0",
        "ResNet-50", "--runners", "JAX", "--image-size", "32", "--batch", "1", "--rounds", "2",
        "--seconds", "0", "--ahead", "--device", "cpu", "--output", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[2/2] ResNet-50" in done.stdout
    assert "failed" not in (tmp_path / "table4.md").read_text()
    assert (tmp_path / "table4-dark.svg").exists()
