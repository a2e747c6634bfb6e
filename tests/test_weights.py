"""Downloading weights from a loopback hub: resumed, checked, swapped in whole, and told plainly when it cannot be."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import PIECE, Fault, LoopbackHub, noise, running, safetensors

from dsr1kit.errors import MissingKey, ModelError, UnknownName, UsageError
from dsr1kit.local.folder import MANIFEST, default_folder
from dsr1kit.local.model import LocalModel
from dsr1kit.local.weights import Patience, Weights, fetch_weights, unfinished
from dsr1kit.paths import data_dir
from dsr1kit.records import Outcome, Sampling

MODEL, BIG = "lab/R1-small", 40 * PIECE
QUICK = Patience(connect_s=5, stall_s=20, retries=3, wait_s=0.01)
OTHERS = "hf_of_somebody_who_accepted_1"
MS_TOKEN = "ms_0123456789abcdef"  # noqa: S105 - made up
TOKEN = "hf_abcdefghijklmnop0123"  # noqa: S105 - a made-up value that must not leak
SMALL = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "README.md": b"# R1\n", "LICENSE": b"MIT\n"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "MODELSCOPE_API_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with running() as started:
        started.folder = tmp_path
        monkeypatch.setenv("HF_ENDPOINT", started.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", started.url)
        yield started


def fetch(model: str = MODEL, **options: Any) -> Weights:
    return asyncio.run(fetch_weights(model, **{"patience": QUICK, **options}))


def simple(size: int = BIG, seed: int = 0) -> dict[str, bytes]:
    return SMALL | {"model.safetensors": safetensors(size, seed)}


def sharded(*seeds: int, size: int = BIG) -> dict[str, bytes]:
    names = [f"model-{n:05}-of-{len(seeds):05}.safetensors" for n in range(1, len(seeds) + 1)]
    index = {"metadata": {}, "weight_map": {f"w{n}": name for n, name in enumerate(names)}}
    shards = {name: safetensors(size, seed) for name, seed in zip(names, seeds, strict=True)}
    return SMALL | {"model.safetensors.index.json": json.dumps(index).encode()} | shards


def holds(folder: Path, files: dict[str, bytes]) -> bool:
    """Whether the folder's visible files are exactly these."""
    there = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}
    return set(there) == set(files) and all(there[name].read_bytes() == content for name, content in files.items())


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "dsr1kit", "weights", *map(str, arguments)]


def dsr1kit(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    return done


# --- the usual way -----------------------------------------------------------------------------------------


def test_a_model_comes_whole_and_opens_as_a_local_model(hub: LoopbackHub) -> None:
    files = {path.name: path.read_bytes() for path in (data_dir() / "tiny-r1").iterdir()}
    commit = hub.push("lab/tiny-r1", files, licence="apache-2.0")
    seen: list[tuple[int, int]] = []
    got = fetch("lab/tiny-r1", on_progress=lambda done, total: seen.append((done, total)))
    del files["training.json"]  # no file that a model is loaded from
    assert holds(got.folder, files)
    assert got.folder == default_folder("lab/tiny-r1", "hub")
    assert (got.commit, got.licence, got.revision, got.changed) == (commit, "apache-2.0", "main", True)
    assert got.total_bytes == got.downloaded_bytes == sum(map(len, files.values()))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (got.total_bytes, got.total_bytes)
    assert unfinished(got.folder) == ""

    async def asked(source: str | Path) -> Any:
        async with LocalModel(source, threads=1) as r1:
            question = [{"role": "user", "content": "What is 48 + 96?"}]
            return await r1.ask(question, Sampling(temperature=0, max_tokens=300))

    by_folder, by_id = asyncio.run(asked(got.folder)), asyncio.run(asked("lab/tiny-r1"))
    assert by_folder.outcome is by_id.outcome is Outcome.OK
    assert by_id.answer == by_folder.answer, "a model that was fetched is found by its id"


def test_the_real_client_takes_the_loopback_hub_for_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    files = simple()
    commit = hub.push(MODEL, files)
    code = (
        "import sys; from huggingface_hub import HfApi, hf_hub_download\n"
        "url, folder = sys.argv[1:]\n"
        f"info = HfApi(endpoint=url).model_info({MODEL!r}, files_metadata=True)\n"
        "assert {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs}\n"
        "for name in ('config.json', 'model.safetensors'):\n"
        f"    hf_hub_download({MODEL!r}, name, endpoint=url, local_dir=folder)\n"
        "print(info.sha, info.card_data.license)"
    )
    env = os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code, hub.url, str(tmp_path / "theirs")],
        capture_output=True, text=True, timeout=120, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [commit, "mit"]
    assert (tmp_path / "theirs" / "model.safetensors").read_bytes() == files["model.safetensors"]
    # What that client left in a folder is used, not fetched again.
    got = fetch(to=tmp_path / "theirs")
    assert hub.sent("model.safetensors") == len(files["model.safetensors"])
    assert not next(f for f in got.files if f.path == "model.safetensors").fetched


def test_pickles_code_and_other_frameworks_are_not_even_asked_for(hub: LoopbackHub) -> None:
    files = sharded(1, 2) | {"chat_template.jinja": b"{{ x }}", "generation_config.json": b"{}", "vocab.json": b"{}"}
    never = (
        "pytorch_model.bin", "model.pt", "flax_model.msgpack", "tf_model.h5", "onnx/model.onnx", "modeling_r1.py",
        "tokenizer.py", "tokenizer.bin", "original/consolidated.safetensors", "training_args.bin", "figures/a.png",
        "docs/README.md",
    )  # fmt: skip
    hub.push(MODEL, files | dict.fromkeys(never, b"no"))
    assert holds(fetch().folder, files)
    assert {one.path for one in hub.contents()} == set(files)


def test_a_model_of_pickles_alone_is_refused_with_the_reason(hub: LoopbackHub) -> None:
    hub.push(MODEL, SMALL | {"pytorch_model.bin": b"\x80\x04."})
    with pytest.raises(ModelError, match=r"only as pickles \(pytorch_model.bin\), which can run any code"):
        fetch()
    with pytest.raises(UsageError, match="only what is never downloaded"):
        fetch(files=["*.bin"])
    assert not hub.contents()
    assert not default_folder(MODEL, "hub").exists()


def test_the_token_reaches_the_hub_and_not_the_network_it_redirects_to(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(MODEL, simple(), token=TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch()
    assert {one.headers.get("Authorization") for one in hub.asked if one.server == "hub"} == {f"Bearer {TOKEN}"}
    cdn = [one for one in hub.asked if one.server == "cdn"]
    assert cdn
    assert not any(TOKEN in str(one.headers) for one in cdn)


def test_no_more_than_four_files_come_at_once(hub: LoopbackHub) -> None:
    files = sharded(*range(9))
    hub.push(MODEL, files)
    for name in files:
        hub.fault(name, *[Fault("gate")] * (".safetensors" in name))
    assert holds(fetch().folder, files)
    assert hub.most_in_flight == 4


def test_files_of_one_content_do_not_get_in_each_others_way(hub: LoopbackHub) -> None:
    files = sharded(7, 7, 7)
    hub.push(MODEL, files)
    assert holds(fetch().folder, files)


# --- breaks ------------------------------------------------------------------------------------------------


def test_a_cut_connection_is_resumed_where_it_broke(hub: LoopbackHub) -> None:
    files = simple()
    hub.push(MODEL, files)
    hub.fault("model.safetensors", Fault("cut", after=16 * PIECE), Fault("cut", after=16 * PIECE))
    got = fetch()
    assert holds(got.folder, files)
    first, second, third = hub.of("model.safetensors")
    assert [first.offset, second.offset, third.offset] == [0, 16 * PIECE, 32 * PIECE]
    assert third.sent == len(files["model.safetensors"]) - 32 * PIECE
    assert got.downloaded_bytes == got.total_bytes


@pytest.mark.parametrize(
    ("faults", "again_from_the_start"),
    [
        ([Fault("cut", after=16 * PIECE), Fault("ignore_range")], True),
        ([Fault("cut", after=16 * PIECE), Fault("wrong_range")], True),
        ([Fault("endless")], True),
        ([Fault("corrupt")], True),
        ([Fault("status", status=503)], True),
        ([Fault("cut", after=16 * PIECE), Fault("status", status=502)], False),
        ([Fault("status", status=429, headers={"Retry-After": "1"})], True),
        ([Fault("cut", after=16 * PIECE), Fault("status", status=403)], False),  # the signed link has run out
        ([Fault("cut", after=16 * PIECE), Fault("status", status=416)], True),
    ],
    ids=lambda value: "+".join(f.kind + str(f.status or "") for f in value) if isinstance(value, list) else "",
)
def test_what_goes_wrong_for_a_while_ends_in_a_whole_file(
    hub: LoopbackHub, faults: list[Fault], again_from_the_start: bool
) -> None:
    files = simple()
    hub.push(MODEL, files)
    hub.fault("model.safetensors", *faults)
    assert holds(fetch().folder, files)
    last = hub.of("model.safetensors")[-1]
    assert (last.sent == len(files["model.safetensors"])) is again_from_the_start
    without_range = faults[-1].kind == "ignore_range"  # then its answer is the whole file, and taken as that
    assert len(hub.of("model.safetensors")) == len(faults) + (not without_range)


def test_retry_after_is_waited_for(hub: LoopbackHub) -> None:
    hub.push(MODEL, simple(100))
    hub.fault("", Fault("status", status=429, headers={"Retry-After": "1"}))
    began = time.monotonic()
    fetch()
    assert time.monotonic() - began >= 1
    hub.fault("", Fault("status", status=429, headers={"Retry-After": "86400"}))
    with pytest.raises(ModelError, match="left alone for 86400 s"):
        fetch(sync=True)


def test_silence_is_ended_and_the_file_resumed(hub: LoopbackHub) -> None:
    files = simple()
    hub.push(MODEL, files)
    hub.fault("model.safetensors", Fault("stall", after=10 * PIECE))
    assert holds(fetch(patience=Patience(stall_s=1, retries=3, wait_s=0.01)).folder, files)
    assert hub.of("model.safetensors")[1].offset > 0


def test_a_connection_that_breaks_often_but_brings_something_is_not_given_up(hub: LoopbackHub) -> None:
    files = simple(12 * 1024 * 1024)
    hub.push(MODEL, files)
    hub.fault("model.safetensors", *[Fault("cut", after=32 * PIECE)] * 3)
    assert holds(fetch(patience=Patience(retries=1, wait_s=0.01)).folder, files)
    assert len(hub.of("model.safetensors")) == 4


def test_it_gives_up_with_the_way_out_and_goes_on_from_there_later(hub: LoopbackHub) -> None:
    files = simple()
    hub.push(MODEL, files)
    hub.fault("model.safetensors", Fault("cut", after=16 * PIECE), *[Fault("status", status=500)] * 4)
    with pytest.raises(ModelError, match="HTTP 500") as told:
        fetch()
    for part in (
        "model.safetensors",
        "same command goes on",
        "HF_ENDPOINT=https://hf-mirror.com",
        "--source modelscope",
    ):
        assert part in str(told.value)
    folder = default_folder(MODEL, "hub")
    assert f"run dsr1kit weights {MODEL} again to finish it" in unfinished(folder)
    got = fetch()
    assert holds(got.folder, files)
    assert hub.of("model.safetensors")[-1].offset == 16 * PIECE
    assert got.downloaded_bytes < got.total_bytes


def test_a_content_that_never_fits_its_checksum_is_thrown_away_and_named(hub: LoopbackHub) -> None:
    hub.push(MODEL, simple())
    hub.fault("model.safetensors", *[Fault("corrupt")] * 9)
    with pytest.raises(ModelError, match=r"model.safetensors of lab/R1-small came 3 times with another checksum"):
        fetch()
    folder = default_folder(MODEL, "hub")
    assert len(hub.of("model.safetensors")) == 3
    assert not (folder / "model.safetensors").exists()
    assert unfinished(folder)
    hub.faults.clear()
    fetch()
    assert hub.of("model.safetensors")[-1].offset == 0


def test_a_small_file_is_checked_as_well(hub: LoopbackHub) -> None:
    hub.push(MODEL, simple())
    hub.fault("config.json", *[Fault("corrupt")] * 9)
    with pytest.raises(ModelError, match=r"config.json"):
        fetch()


def part_of(folder: Path, at_least: int) -> Path:
    """The partial file below a folder, once it holds so many bytes."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for part in folder.glob(".incoming/*.part"):
            if part.exists() and part.stat().st_size >= at_least:
                return part
        time.sleep(0.02)
    raise AssertionError("no such partial file")


def test_a_killed_download_goes_on_with_the_bytes_that_were_missing(hub: LoopbackHub, tmp_path: Path) -> None:
    files = simple()
    hub.push(MODEL, files)
    hub.fault("model.safetensors", Fault("stall", after=25 * PIECE))
    with subprocess.Popen(command(MODEL, "--to", tmp_path / "m"), stdout=subprocess.DEVNULL) as process:
        kept = part_of(tmp_path / "m", 20 * PIECE)
        process.send_signal(signal.SIGKILL)
    assert unfinished(tmp_path / "m")
    size = kept.stat().st_size
    told = json.loads(dsr1kit(MODEL, "--to", tmp_path / "m", "--json").stdout)["models"][0]
    assert holds(tmp_path / "m", files)
    last = hub.of("model.safetensors")[-1]
    assert (last.offset, last.sent) == (size, len(files["model.safetensors"]) - size)
    assert told["downloaded_bytes"] == last.sent
    assert not (tmp_path / "m" / ".incoming").exists()


def test_an_interrupted_download_says_how_it_goes_on(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.push(MODEL, simple())
    hub.fault("model.safetensors", Fault("stall", after=5 * PIECE))
    with subprocess.Popen(command(MODEL, "--to", tmp_path / "m"), stderr=subprocess.PIPE, text=True) as process:
        part_of(tmp_path / "m", PIECE)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in told
    assert "Traceback" not in told


def test_a_disk_that_fills_keeps_what_came_and_says_what_is_missing(hub: LoopbackHub, tmp_path: Path) -> None:
    files = simple()
    hub.push(MODEL, files)
    code = (
        "import resource, sys; from dsr1kit.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({10 * PIECE}, {10 * PIECE}))\n"
        f"sys.argv = ['dsr1kit', 'weights', {MODEL!r}, '--to', {str(tmp_path / 'm')!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1, done.stderr
    missing = len(files["model.safetensors"]) - part_of(tmp_path / "m", 10 * PIECE).stat().st_size
    for part in ("is full", f"{missing} bytes of model.safetensors are missing", "--to DIR"):
        assert part in done.stderr, done.stderr
    fetch(to=tmp_path / "m")
    assert holds(tmp_path / "m", files)
    assert hub.of("model.safetensors")[-1].offset == 10 * PIECE


def test_a_model_that_the_disk_cannot_hold_is_refused_before_a_byte_comes(hub: LoopbackHub) -> None:
    hub.push(MODEL, simple())
    hub.listing_extra = [entry("model-huge.safetensors", size=10**17)]
    with pytest.raises(ModelError, match=r"needs 100000.0 TB more in .* are free: free \d+\.\d TB, or name a folder"):
        fetch()
    assert not hub.contents()
    assert "needs 100000.0 TB more" in dsr1kit(MODEL, "--dry-run", code=1).stderr


# --- a folder that changes ---------------------------------------------------------------------------------


def test_a_whole_folder_is_returned_without_asking_anybody(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(MODEL, simple())
    first = fetch()
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = fetch()
    assert not hub.asked
    assert (again.commit, again.changed, again.downloaded_bytes) == (first.commit, False, 0)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        fetch(sync=True)


def test_a_sync_fetches_what_changed_and_leaves_what_is_the_persons_own(hub: LoopbackHub) -> None:
    before = sharded(1, 2) | {"tokenizer_config.json": b"{}", "generation_config.json": b"old"}
    hub.push(MODEL, before)
    folder = fetch().folder
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("# R1, as I see it\n")
    (folder / "tokenizer_config.json").write_text('{"mine": true}')
    after = sharded(1, 3, 4) | {"README.md": b"# R1, better\n"}
    commit = hub.push(MODEL, after)
    hub.asked.clear()
    got = fetch(sync=True)
    assert got.commit == commit
    assert {one.path for one in hub.contents()} == {"README.md", "model.safetensors.index.json", *list(after)[-3:]}
    assert got.removed == (
        "generation_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "tokenizer_config.json",
    )  # fmt: skip
    own = {
        "notes.txt": b"mine", "README.md.yours": b"# R1, as I see it\n", "tokenizer_config.json": b'{"mine": true}',
    }  # fmt: skip
    assert holds(folder, after | own)
    hub.asked.clear()
    assert not fetch(sync=True).changed
    assert not hub.contents()
    assert holds(folder, after | own)


def test_a_sync_mends_a_file_that_was_damaged_or_lost(hub: LoopbackHub) -> None:
    files = sharded(1, 2)
    hub.push(MODEL, files)
    folder = fetch().folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    with (folder / "model-00001-of-00002.safetensors").open("r+b") as opened:
        opened.seek(5000)
        opened.write(b"rot")
    assert "1 of 7 files are missing" in unfinished(folder)
    fetch(sync=True)
    assert holds(folder, files)


def test_the_old_model_stays_whole_until_the_new_one_is_complete(hub: LoopbackHub) -> None:
    old, new = sharded(1, 2), sharded(3, 4)
    hub.push(MODEL, old)
    folder = fetch().folder
    hub.push(MODEL, new)
    hub.fault("model-00002-of-00002.safetensors", Fault("cut", after=16 * PIECE), *[Fault("status", status=500)] * 9)
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        fetch(sync=True)
    assert unfinished(folder) == ""
    assert all((folder / name).read_bytes() == content for name, content in old.items())
    hub.faults.clear()
    hub.asked.clear()
    fetch(sync=True)
    assert holds(folder, new)
    assert [one.offset for one in hub.contents() if one.server == "cdn"] == [16 * PIECE]


def test_a_folder_left_in_the_middle_of_the_swap_is_told_and_finished(hub: LoopbackHub) -> None:
    old, new = sharded(1, 2), sharded(3, 4) | {"vocab.json": b"{}"}
    hub.push(MODEL, old)
    folder = fetch().folder
    hub.push(MODEL, new)
    (folder / "vocab.json" / "in-the-way").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"vocab.json.* cannot be read or written"):
        fetch(sync=True)
    assert "is not downloaded to the end" in unfinished(folder)
    (folder / "vocab.json" / "in-the-way").rmdir()
    (folder / "vocab.json").rmdir()
    hub.asked.clear()
    got = fetch()
    assert not hub.contents()
    assert got.downloaded_bytes == 0
    assert holds(folder, new)
    assert unfinished(folder) == ""


def test_a_model_that_changes_between_two_attempts_is_of_one_commit(hub: LoopbackHub) -> None:
    hub.push(MODEL, sharded(1, 2))
    stop = [Fault("cut", after=16 * PIECE), *[Fault("status", status=500)] * 4]
    hub.fault("model-00001-of-00002.safetensors", *stop)
    with pytest.raises(ModelError):
        fetch()
    hub.faults.clear()
    new = sharded(1, 9)
    commit = hub.push(MODEL, new)
    hub.asked.clear()
    got = fetch()
    assert (got.commit, holds(got.folder, new)) == (commit, True)
    assert hub.of("model-00001-of-00002.safetensors")[0].offset == 16 * PIECE  # unchanged: resumed
    assert hub.of("model-00002-of-00002.safetensors")[0].offset == 0  # changed: never continued


def test_what_is_fetched_is_pinned_to_the_commit_that_was_listed(hub: LoopbackHub) -> None:
    commit = hub.push(MODEL, simple(100, seed=1))
    hub.push(MODEL, simple(100, seed=2))
    hub.repos[MODEL].tags["v1"] = commit
    assert fetch(revision="v1").commit == commit
    folder = default_folder(MODEL, "hub")
    assert (folder / "model.safetensors").read_bytes() == safetensors(100, 1)
    assert not fetch(sync=True).changed  # the tag of last time, not the main branch
    assert fetch(revision="main").changed
    assert (folder / "model.safetensors").read_bytes() == safetensors(100, 2)


def test_a_push_in_the_middle_of_a_download_changes_nothing_of_it(hub: LoopbackHub) -> None:
    old = sharded(1, 2)
    commit = hub.push(MODEL, old)
    pushed: list[str] = []

    def progress(done: int, total: int) -> None:
        if not pushed:
            pushed.append(hub.push(MODEL, sharded(3, 4)))

    got = fetch(on_progress=progress)
    assert pushed
    assert got.commit == commit
    assert holds(got.folder, old)


def test_a_second_download_of_a_folder_waits_and_fetches_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    files = simple()
    hub.push(MODEL, files)
    hub.fault("model.safetensors", Fault("stall", after=10 * PIECE))
    with subprocess.Popen(command(MODEL, "--to", tmp_path / "m"), stderr=subprocess.DEVNULL) as process:
        part_of(tmp_path / "m", 5 * PIECE)
        notes: list[str] = []

        def told(note: str) -> None:
            notes.append(note)
            process.kill()  # its lock goes with it

        fetch(to=tmp_path / "m", on_note=told)
    waiting, fetching = notes
    assert "another download into" in waiting
    assert fetching.startswith(f"fetching {MODEL} (")
    assert holds(tmp_path / "m", files)


def test_two_downloads_at_once_bring_each_byte_once(hub: LoopbackHub, tmp_path: Path) -> None:
    files = sharded(1, 2, 3)
    hub.push(MODEL, files)
    both = [subprocess.Popen(command(MODEL, "--to", tmp_path / "m"), stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=90) for process in both] == [0, 0]
    assert holds(tmp_path / "m", files)
    assert sum(hub.sent(name) for name in files) == sum(map(len, files.values()))


def test_a_folder_of_another_model_is_left_alone(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.push(MODEL, simple())
    hub.push("lab/other", simple(seed=5))
    fetch(to=tmp_path / "m")
    with pytest.raises(UsageError, match=f"holds {MODEL} from hub: name another folder"):
        fetch("lab/other", to=tmp_path / "m")


def test_only_folders_of_ours_are_ever_unfinished(hub: LoopbackHub, tmp_path: Path) -> None:
    assert unfinished(tmp_path) == ""
    assert unfinished(tmp_path / "nowhere") == ""
    assert unfinished(data_dir() / "tiny-r1") == ""
    hub.push(MODEL, simple())
    fetch(to=tmp_path / "m")
    (tmp_path / "m" / MANIFEST).write_text("{")
    assert "run dsr1kit weights MODEL --to" in unfinished(tmp_path / "m")
    fetch(to=tmp_path / "m")
    assert unfinished(tmp_path / "m") == ""


# --- GGUF --------------------------------------------------------------------------------------------------


def gguf(size: int, seed: int = 0) -> bytes:
    return b"GGUF" + noise(size - 4, seed)


def test_one_of_several_gguf_files_is_chosen_by_the_person(hub: LoopbackHub) -> None:
    files = {"r1-Q4_K_M.gguf": gguf(4000), "r1-Q8_0.gguf": gguf(8000), "README.md": b"# R1\n"}
    split = {f"F16/r1-F16-{n:05}-of-00002.gguf": gguf(9000, n) for n in (1, 2)}
    hub.push(MODEL, files | split)
    told = dsr1kit(MODEL, code=2).stderr
    assert "holds 3 GGUF models; choose with --file" in told
    assert "4.0 kB  r1-Q4_K_M.gguf" in told
    assert "18.0 kB  F16/r1-F16-*-of-00002.gguf" in told
    assert f"dsr1kit weights {MODEL} --file 'r1-Q4_K_M.gguf'" in told
    assert not hub.contents()
    folder = fetch(files=["*Q4_K_M*"]).folder
    assert holds(folder, {name: files[name] for name in ("r1-Q4_K_M.gguf", "README.md")})
    assert not fetch().changed  # the choice is remembered
    fetch(files=["*F16-00002*"])  # a part brings its series, and what was there stays
    assert holds(folder, {name: files[name] for name in ("r1-Q4_K_M.gguf", "README.md")} | split)
    with pytest.raises(UsageError, match=r"finds nothing in .*it holds F16/r1-F16-00001-of-00002.gguf.*r1-Q8_0.gguf"):
        fetch(files=["*Q2*"])


def test_a_choice_added_later_leaves_the_first_in_the_care_of_sync(hub: LoopbackHub) -> None:
    files = simple(1000) | {"r1-Q8_0.gguf": gguf(8000)}
    hub.push(MODEL, files)
    folder = fetch().folder
    assert holds(folder, simple(1000))
    fetch(files=["*.gguf"])
    new = simple(1000, seed=5) | {"r1-Q8_0.gguf": gguf(8000, 5)}
    hub.push(MODEL, new)
    fetch(sync=True)
    assert holds(folder, new)


def test_the_only_gguf_needs_no_choice(hub: LoopbackHub) -> None:
    files = {f"r1-Q4_K_M-{n:05}-of-00003.gguf": gguf(5000, n) for n in (1, 2, 3)}
    hub.push(MODEL, files)
    assert holds(fetch().folder, files)
    hub.push("lab/incomplete", dict(list(files.items())[:2]))
    with pytest.raises(ModelError, match="lists not all 3 parts"):
        fetch("lab/incomplete")


# --- what a hub may not do ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (simple() | {"model.safetensors": safetensors(5000)[:-1]}, "no whole safetensors file"),
        (simple() | {"model.safetensors": b"<html>not weights</html>"}, "no whole safetensors file"),
        (simple() | {"model.safetensors": b""}, "no whole safetensors file"),
        ({"r1.gguf": b"GGML" + bytes(100)}, "does not begin as a GGUF file does"),
        (sharded(1, 2) | {"model.safetensors.index.json": b"[]"}, "no index of shards"),
        (
            simple() | {"model.safetensors.index.json": b'{"weight_map": {"a": "lost.safetensors"}}'},
            "names lost.safetensors",
        ),
    ],
    ids=["cut", "html", "empty", "ggml", "bad-index", "lost-shard"],
)
def test_a_broken_repository_never_takes_a_sound_models_place(
    hub: LoopbackHub, files: dict[str, bytes], told: str
) -> None:
    sound = simple() if "r1.gguf" not in files else {"r1.gguf": gguf(100)}
    hub.push(MODEL, sound)
    folder = fetch().folder
    hub.push(MODEL, files)
    with pytest.raises(ModelError, match=told):
        fetch(sync=True)
    assert unfinished(folder) == ""
    assert all((folder / name).read_bytes() == content for name, content in sound.items())


def entry(path: str, size: int = 10) -> dict[str, Any]:
    return {"rfilename": path, "size": size, "lfs": {"sha256": "0" * 64, "size": size, "pointerSize": 1}}


@pytest.mark.parametrize(
    "path",
    [
        "../model.safetensors", "/etc/model.safetensors", "..\\model.safetensors", "a/../../model.safetensors",
        "a//model.safetensors", "x" * 300 + ".safetensors", "a\0b.safetensors", ".incoming/model.safetensors",
        MANIFEST,
    ],
)  # fmt: skip
def test_a_path_that_leads_out_of_the_folder_is_refused(hub: LoopbackHub, tmp_path: Path, path: str) -> None:
    hub.push(MODEL, simple())
    hub.listing_extra = [entry(path)]
    with pytest.raises(ModelError, match="which would be written outside of its folder"):
        fetch(to=tmp_path / "m", files=["*"])
    assert not hub.contents()
    assert not list((tmp_path / "m").glob("*"))


@pytest.mark.parametrize("where", ["file:///etc/passwd", "http://127.0.0.1:99999/x", "http://[::1/x", "ftp://h/x"])
def test_a_redirect_to_what_is_no_web_address_is_refused(hub: LoopbackHub, where: str) -> None:
    hub.push(MODEL, simple())
    hub.fault("model.safetensors", *[Fault("location", headers={"Location": where})] * 9)
    with pytest.raises(ModelError, match="redirects to what is no http"):
        fetch()


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"rfilename": "model-x.safetensors", "size": 5}, "states no checksum for model-x.safetensors"),
        (entry("model-x.safetensors", size=-5), "states no checksum|needs"),
        (entry("model.safetensors"), "lists a file twice"),
        ({"size": 5}, "in a way that is not understood"),
        ({"rfilename": "a.safetensors", "lfs": "yes"}, "in a way that is not understood"),
    ],
)
def test_a_listing_that_cannot_be_trusted_is_refused(hub: LoopbackHub, extra: dict[str, Any], told: str) -> None:
    hub.push(MODEL, simple())
    hub.listing_extra = [extra]
    with pytest.raises(ModelError, match=told):
        fetch()
    assert not hub.contents()


# --- what a person gets wrong, or cannot help ----------------------------------------------------------------


def test_a_model_or_revision_that_is_not_there_is_told(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(MODEL, simple())
    for token in ("", TOKEN):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UsageError, match=r"has no model lab/R1-smal, or it is private.*HF_TOKEN=") as told:
            fetch("lab/R1-smal")
        assert TOKEN not in str(told.value)
        with pytest.raises(UsageError, match=r"has no revision 'v9'.*: name a branch, tag or commit"):
            fetch(revision="v9")
    for wrong in ("R1", "lab/", "../etc/passwd", "a/b/c", "https://huggingface.co/a/b"):
        with pytest.raises(UsageError, match="is no hub id"):
            fetch(wrong)
    with pytest.raises(UnknownName, match="did you mean 'modelscope'"):
        fetch(source="modelscop")
    assert not default_folder(MODEL, "hub").exists()


def test_a_gated_model_says_where_its_licence_is_accepted(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(MODEL, simple(), gated=True, token=OTHERS)
    where = f"accept its licence at {hub.url}/{MODEL} and export HF_TOKEN="
    with pytest.raises(MissingKey, match=where):
        fetch()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ModelError, match=f"account of HF_TOKEN has no access yet: {where}"):
        fetch()
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    with pytest.raises(ModelError, match="refuses the token in HF_TOKEN"):
        fetch()
    monkeypatch.setenv("HF_TOKEN", OTHERS)
    assert fetch().changed


def test_a_hub_that_cannot_be_reached_is_told_with_the_ways_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"127.0.0.1") as told:
        fetch()
    for part in ("HF_ENDPOINT=https://hf-mirror.com", "--source modelscope", "HTTPS_PROXY"):
        assert part in str(told.value)
    for wrong in ("hf-mirror.com", "http://", "http://[::1", "http://h:99999"):
        monkeypatch.setenv("HF_ENDPOINT", wrong)
        with pytest.raises(UsageError, match=r"HF_ENDPOINT=.* is no http\(s\):// URL"):
            fetch()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1080")
    with pytest.raises(UsageError, match="HTTP_PROXY names a socks5:// proxy"):
        fetch()


def test_a_proxy_is_used_but_for_hosts_that_are_excepted(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    files = simple()
    hub.push(MODEL, files)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")  # a name that only the proxy could know
    monkeypatch.setenv("http_proxy", hub.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert holds(fetch().folder, files)
    assert {one.headers["Host"] for one in hub.asked if one.server == "hub"} == {"hub.invalid"}


def test_a_folder_that_cannot_be_written_is_told(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.push(MODEL, simple())
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        fetch(to=tmp_path / "file" / "m")


# --- ModelScope --------------------------------------------------------------------------------------------


def test_modelscope_gives_the_same_folder(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sharded(1, 2)
    commit = hub.push(MODEL, files, token=MS_TOKEN, licence="MIT License")
    with pytest.raises(
        UsageError, match=r"ModelScope has no model lab/R1-small.*record not found.*MODELSCOPE_API_TOKEN"
    ):
        fetch(source="modelscope")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", MS_TOKEN)
    hub.fault("model-00001-of-00002.safetensors", Fault("cut", after=16 * PIECE))
    got = fetch(source="modelscope")
    assert holds(got.folder, files)
    assert got.folder == default_folder(MODEL, "modelscope") != default_folder(MODEL, "hub")
    assert (got.commit, got.licence, got.revision) == (commit, "MIT License", "master")
    assert hub.of("model-00001-of-00002.safetensors")[1].offset == 16 * PIECE
    new = sharded(1, 5)
    hub.push(MODEL, new)
    hub.asked.clear()
    assert fetch(source="modelscope", sync=True).changed
    assert {one.path for one in hub.contents()} == {"model-00002-of-00002.safetensors"}
    with pytest.raises(UsageError, match="has no revision 'v9'"):
        fetch(source="modelscope", revision="v9")


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_prints_the_folder_or_one_object(hub: LoopbackHub, tmp_path: Path) -> None:
    files = simple()
    commit = hub.push(MODEL, files)
    planned = json.loads(dsr1kit(MODEL, "--dry-run", "--json").stdout)
    assert planned["dry_run"] is True
    assert planned["models"][0]["downloaded_bytes"] == sum(map(len, files.values()))
    assert not hub.contents()
    assert not (tmp_path / "cache").exists()
    shown = dsr1kit(MODEL, "--dry-run").stdout
    assert "model.safetensors" in shown
    assert "would be fetched" in shown
    done = dsr1kit(MODEL)
    assert done.stdout.splitlines()[0] == f"{MODEL} at {commit[:12]}, licence: mit"
    assert done.stdout.splitlines()[-1] == str(default_folder(MODEL, "hub"))
    told = json.loads(dsr1kit(MODEL, "--sync", "--json").stdout)["models"][0]
    assert (told["changed"], told["downloaded_bytes"], told["licence"]) == (False, 0, "mit")
    assert "all 5 files are there" in dsr1kit(MODEL).stdout


def test_a_nightly_sync_goes_on_after_a_model_that_fails(hub: LoopbackHub) -> None:
    hub.push(MODEL, simple())
    hub.push("lab/b", simple(seed=2))
    done = dsr1kit(MODEL, "lab/none", "lab/b", "--sync", "--json", code=2)
    told = json.loads(done.stdout)["models"]
    assert [one["model"] for one in told] == [MODEL, "lab/none", "lab/b"]
    assert "has no model lab/none" in told[1]["error"]
    assert "has no model lab/none" in done.stderr
    assert told[2]["changed"]
    assert "name one, or leave --to out" in dsr1kit(MODEL, "lab/b", "--to", "x", code=2).stderr


def test_help_shows_the_line_for_cron() -> None:
    assert "0 3 * * *  dsr1kit weights ORG/NAME ORG/OTHER --sync" in dsr1kit("--help").stdout.replace("\n", " ")
