"""The small files of a workdir, damaged in every way: one line that names the file, or the run goes on without it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from crpo_jax import config
from crpo_jax.answer.records import read_dropped, read_summary
from crpo_jax.cli import path_of
from crpo_jax.config import Config
from crpo_jax.disk import remove
from crpo_jax.errors import Fault, InputError
from crpo_jax.model.huggingface import free_folder
from crpo_jax.runtime.compilations import enable_compilation_cache
from crpo_jax.runtime.fine_tuning import is_cold_start
from crpo_jax.runtime.report import before_and_after
from crpo_jax.score import main as score_main
from crpo_jax.store.checkpoint import refuse_patterns
from crpo_jax.store.journal import Journal
from crpo_jax.store.logs import Log
from crpo_jax.store.metrics import read_metrics
from crpo_jax.store.workdir import FILES, FOLDERS, check_inputs, has_folder, open_workdir

DIGESTS = {"training questions": "a", "tokenizer": "b"}


def settings(*overrides: str) -> Config:
    return config.load_config(None, ["tokenizer.path=somewhere", *overrides], model=False)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "blank": lambda path: path.write_bytes(b"\n"),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a list": lambda path: path.write_text("[1]\n"),
    "a number": lambda path: path.write_text("7\n"),
    "a text": lambda path: path.write_text('"config"\n'),
    "other values": lambda path: path.write_text('{"data": 3, "step": "x"}\n'),
    "bad UTF-8": lambda path: path.write_bytes(b'{"data": "\xff\xfe"}\n'),
    "too deep": lambda path: path.write_bytes(b"[" * 3000),
    "a folder": folder_instead,
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to(f"{path}.nowhere")),
}

damaged = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """As an evaluated run leaves it."""
    folder = tmp_path / "run"
    open_workdir(folder, settings()).close()
    check_inputs(folder, DIGESTS)
    with Log(folder) as log:
        for step in range(3):
            log.samples([{"step": step, "response": "a"}])
            log.step(step, {"reward/mean": 1.0})
    (folder / "summary.json").write_text(json.dumps({"model": "m", "data": {"d": {}}}))
    (folder / "dropped.json").write_text(json.dumps({"d": ["1"]}))
    return folder


def outcome(action: Callable[[], object]) -> str:
    """The line of an InputError, "" where the action goes on; anything else raised fails the test."""
    try:
        action()
    except InputError as error:
        line = str(error)
        assert "\n" not in line
        return line
    return ""


@damaged
def test_a_damaged_config_is_named(damage: Callable[[Path], object], workdir: Path):
    damage(workdir / "config.yaml")
    line = outcome(lambda: open_workdir(workdir, settings()).close())
    assert "config.yaml" in line
    assert "--config" not in line
    if "Choose another --workdir, or continue in this one with --allow-changes" in line:
        open_workdir(workdir, settings(), allow_changes=True).close()
        assert outcome(lambda: open_workdir(workdir, settings()).close()) == ""


@damaged
def test_damaged_inputs_are_named_or_written_again(damage: Callable[[Path], object], workdir: Path):
    path = workdir / "inputs.json"
    damage(path)
    lines = [outcome(action) for action in (lambda: check_inputs(workdir, DIGESTS), lambda: is_cold_start(workdir))]
    if not path.exists() or lines == ["", ""]:
        assert json.loads(path.read_text()) == DIGESTS
        return
    assert all(str(path) in line or "got other" in line or not line for line in lines)
    assert any(lines)
    if path.is_file():
        check_inputs(workdir, DIGESTS, allow_changes=True)
        check_inputs(workdir, DIGESTS)


@damaged
def test_a_damaged_log_is_named_or_not_needed(
    damage: Callable[[Path], object], workdir: Path, capsys: pytest.CaptureFixture[str]
):
    """Metrics are read by what compares evaluations; samples are only added to."""
    sizes = {name: (workdir / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")}
    for name in sizes:
        damage(workdir / name)
    line = outcome(lambda: read_metrics(workdir))
    assert not line or str(workdir / "metrics.jsonl") in line
    if (workdir / "metrics.jsonl").is_dir():
        assert "metrics.jsonl: expected a file, got a folder" in outcome(lambda: open_workdir(workdir, settings()))
        return
    with Log(workdir, 3, sizes) as log:
        log.samples([{"step": 3, "response": "b"}])
        log.step(3, {"reward/mean": 2.0})
    said = capsys.readouterr().err
    for name, size in sizes.items():
        assert f"{workdir / name}: " in said
        assert f"bytes instead of {size:,}: lines of earlier steps are missing, and the run goes on" in said
    assert [row["step"] for row in read_metrics(workdir)][-1] == 3
    assert b"\0" not in (workdir / "samples.jsonl").read_bytes()


@damaged
@pytest.mark.parametrize(("read", "name"), [(read_summary, "summary.json"), (read_dropped, "dropped.json")])
def test_a_damaged_summary_is_named(
    damage: Callable[[Path], object], read: Callable[[Path], object], name: str, workdir: Path
):
    path = workdir / name
    damage(path)
    line = outcome(lambda: read(path if read is read_summary else workdir))
    assert str(path) in line or (name == "dropped.json" and not path.exists())
    assert not line or "delete it" in line


@damaged
def test_a_damaged_journal_is_named_or_continued(damage: Callable[[Path], object], tmp_path: Path):
    """A torn last line is cut off; without the file nothing was answered yet."""
    path, fields = tmp_path / "rows.jsonl", {"key": str, "right": bool}
    with Journal(path, fields) as journal:
        journal.append({"key": "1", "right": True})
    damage(path)
    line = outcome(lambda: Journal(path, fields).__exit__())
    assert str(path) in line or (path.is_file() and path.read_bytes() in (b"",))


@damaged
def test_damaged_held_out_responses_end_no_run(damage: Callable[[Path], object], tmp_path: Path):
    """They are only shown when the run is over."""
    (tmp_path / "report").mkdir()
    row = {"id": "1", "question": "Why?", "options": {"A": "a"}, "answer": "A", "response": "r", "total": 1.0}
    for step in (0, 5):
        (tmp_path / "report" / f"held_out_{step:06d}.jsonl").write_text(json.dumps(row) + "\n")
    assert before_and_after(tmp_path, 0, 5).startswith("Why?\nA) a\n")
    damage(tmp_path / "report" / "held_out_000005.jsonl")
    text = before_and_after(tmp_path, 0, 5)
    assert text.startswith("no held-out question can be shown before and after from")
    assert "\n" not in text


@pytest.mark.parametrize("name", [*FOLDERS, *FILES])
def test_one_kind_in_the_place_of_the_other_is_refused_at_the_start(name: str, workdir: Path):
    path, kind = workdir / name, "folder" if name in FOLDERS else "file"
    remove(path)
    path.write_text("") if kind == "folder" else path.mkdir()
    expected = f"{path}: expected a {kind}, got a {'file' if kind == 'folder' else 'folder'}; move it away"
    assert expected in outcome(lambda: open_workdir(workdir, settings()))
    assert expected in outcome(lambda: has_folder(workdir, "coldstart"))


def test_what_an_interrupted_first_write_leaves_is_no_folder_of_someone_else(tmp_path: Path):
    (tmp_path / ".lock").touch()
    (tmp_path / "config.yaml.new").write_text("crp")
    open_workdir(tmp_path, settings()).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml"]


# ---- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "gs:/bucket", "hf+x://a", "https://a/b"])
def test_a_url_is_refused_wherever_it_would_make_a_folder(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for action in (
        lambda: path_of("--workdir")(path),
        lambda: open_workdir(Path(path), settings()),
        lambda: free_folder(path),
        lambda: enable_compilation_cache(path),
    ):
        assert "expected a folder or file on a mounted disk, got a URL" in outcome(action)
    assert score_main(["--responses", "-", "--out", path]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a*", "is it?", "[1]"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also one that is relative to such a folder. What has no checkpoints may be there."""
    (tmp_path / name).mkdir()
    assert "--workdir run: expected a path without *, ? and [" in outcome(
        lambda: (monkeypatch.chdir(tmp_path / name), refuse_patterns(Path("run")))
    )
    open_workdir(Path("run"), settings()).close()


def test_a_home_is_expanded_where_the_shell_does_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert path_of("--workdir")("~/run") == "/somewhere/run"
    assert path_of("--workdir")("-") == "-"


# ---- moved or deleted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["moved", "deleted", "replaced", "only the log deleted"])
def test_a_log_that_is_not_where_it_was_opened_is_a_fault(how: str, tmp_path: Path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with Log(workdir) as log, Journal(workdir / "rows.jsonl", {}) as journal:
        log.check_in_place()
        if how == "only the log deleted":
            for name in ("metrics.jsonl", "rows.jsonl"):
                (workdir / name).unlink()
        else:
            workdir.rename(tmp_path / "elsewhere")
        if how == "replaced":
            workdir.mkdir()
            Log(workdir).__exit__(None)
            Journal(workdir / "rows.jsonl", {}).__exit__()
        for action in (log.check_in_place, lambda: journal.append({"a": 1})):
            with pytest.raises(Fault, match=r"jsonl: moved or deleted while it was being written"):
                action()
    if how != "replaced":
        assert how == "only the log deleted" or not workdir.exists()
