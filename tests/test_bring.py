"""Hub ids that are opened: fetched checked, refused before where they do not fit, taken as they are where they are."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub import PIECE, Fault, LoopbackHub, git_blob, running, safetensors

from dsr1kit.errors import MissingKey, ModelError, UsageError
from dsr1kit.finetune.base import is_small, open_base
from dsr1kit.finetune.data import load_examples
from dsr1kit.finetune.modelcard import base_of, serve_commands
from dsr1kit.finetune.settings import AdapterSettings, SftSettings
from dsr1kit.finetune.sft import train_sft
from dsr1kit.finetune.tuning import suited, tokenizer_and_marks
from dsr1kit.local import room
from dsr1kit.local.bring import bring, bring_now
from dsr1kit.local.engines import Engine
from dsr1kit.local.folder import default_folder
from dsr1kit.local.hardware import look
from dsr1kit.local.identity import place_of
from dsr1kit.local.model import LocalModel
from dsr1kit.local.places import is_here, locate
from dsr1kit.paths import data_dir
from dsr1kit.records import Outcome, Reply, Sampling

LOGGED_IN = "hf_logged_in_before_1"
MODEL = "lab/R1-tiny"
TINY = {
    path.name: path.read_bytes() for path in (data_dir() / "tiny-r1").iterdir() if path.name != "training.json"
}  # fmt: skip
CONFIG = json.loads(TINY["config.json"])
_WIDE = {"num_hidden_layers": 4000, "layer_types": None, "hidden_size": 32768, "head_dim": 256}
HUGE = TINY | {"config.json": json.dumps(CONFIG | _WIDE).encode()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with running() as started:
        started.folder = tmp_path
        monkeypatch.setenv("HF_ENDPOINT", started.url)
        yield started


def ask(source: str, **options: Any) -> Reply:
    async def asked() -> Reply:
        async with LocalModel(source, threads=1, **options) as r1:
            return await r1.ask(
                [{"role": "user", "content": "What is 48 + 96?"}], Sampling(temperature=0, max_tokens=200)
            )

    return asyncio.run(asked())


def lay_in_the_hubs_cache(home: Path, model: str, files: dict[str, bytes]) -> Path:
    """As the hub's client lays it: refs, blobs by their digests, snapshots of links."""
    kept = home / "hub" / f"models--{model.replace('/', '--')}"
    snapshot = kept / "snapshots" / ("0" * 40)
    for folder in (snapshot, kept / "refs", kept / "blobs"):
        folder.mkdir(parents=True, exist_ok=True)
    (kept / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        blob = kept / "blobs" / git_blob(content)
        blob.write_bytes(content)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


# --- fetched ------------------------------------------------------------------------------------------------


def test_a_hub_id_is_fetched_checked_and_opened_and_asked_for_only_once(
    hub: LoopbackHub, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.push(MODEL, TINY, licence="mit")
    hub.fault("model.safetensors", Fault("corrupt"))
    reply = ask(MODEL)
    assert reply.outcome is Outcome.OK
    assert reply.answer == ask("tiny-r1").answer
    assert len(hub.of("model.safetensors")) == 2, "what came with another checksum was fetched again"
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1, "no noise of a library's own client"
    assert f"dsr1kit: fetching {MODEL} (" in told[0]
    assert "licence: mit" in told[0]
    asked = len(hub.asked)
    assert ask(MODEL).answer == reply.answer
    assert len(hub.asked) == asked
    assert place_of(MODEL) == MODEL
    assert capfd.readouterr().err == ""


def test_what_stays_corrupt_is_not_opened(hub: LoopbackHub) -> None:
    hub.push(MODEL, TINY)
    hub.fault("model.safetensors", *[Fault("corrupt")] * 3)
    with pytest.raises(ModelError, match="another checksum than the Hugging Face Hub states") as raised:
        ask(MODEL)
    assert f"such options are those of dsr1kit weights {MODEL}" in str(raised.value)
    assert not is_here(MODEL)


def test_what_does_not_fit_is_told_before_any_of_it_is_fetched(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(MODEL, HUGE)
    with pytest.raises(ModelError, match=rf"{MODEL} does not fit: .* GiB short\. What would fit"):
        ask(MODEL)
    with pytest.raises(ModelError, match="GiB short"):
        ask(MODEL, quantization="4bit")
    with pytest.raises(ModelError, match="GiB short"):
        asyncio.run(Engine(MODEL, engine="transformers").__aenter__())
    assert {one.path for one in hub.contents()} == {"config.json"}
    assert not default_folder(MODEL, "hub").exists()
    hub.push(MODEL, TINY)
    monkeypatch.setattr(room, "look", lambda: replace(look(), gpus=(), memory_free_bytes=1_500_000))
    with pytest.raises(ModelError, match="does not fit"):
        ask(MODEL)
    hub.push(MODEL, edited(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(ModelError, match="does not fit: its files alone have"):
        ask(MODEL)
    assert not hub.of("model.safetensors")


def test_what_cannot_be_opened_is_told_with_what_mends_it(hub: LoopbackHub) -> None:
    hub.push("lab/gated", TINY, gated=True)
    hub.push("lab/pickled", {"config.json": TINY["config.json"], "pytorch_model.bin": b"x"})
    hub.push("lab/packed", {"README.md": b"", "a.Q4_K_M.gguf": b"GGUF", "a.Q8_0.gguf": b"GGUF"})
    hub.push("lab/broken", TINY | {"config.json": b"{"})
    for model, error, words in (
        ("lab/misspelled", UsageError, "check the spelling"),
        ("lab/gated", MissingKey, "lab/gated is gated: accept its licence at .* and export HF_TOKEN"),
        ("lab/pickled", ModelError, r"only as pickles \(pytorch_model.bin\), which can run any code"),
        ("lab/packed", UsageError, r"choose with --file(.|\n)*dsr1kit weights lab/packed --file 'a.Q4_K_M.gguf'"),
        ("lab/broken", ModelError, "config.json of lab/broken is no JSON"),
    ):
        with pytest.raises(error, match=words):
            ask(model)
        with pytest.raises(error, match=words):
            asyncio.run(Engine(model, engine="llama.cpp" if "packed" in model else "transformers").__aenter__())
    assert not hub.of("pytorch_model.bin")


def edited(**changes: Any) -> dict[str, bytes]:
    """The tiny model with another configuration."""
    return TINY | {"config.json": json.dumps(CONFIG | changes).encode()}


@pytest.mark.parametrize(
    ("files", "options", "error", "words"),
    [
        (TINY, {"device": "banana"}, UsageError, "device 'banana' is none of torch's: leave it at 'auto'"),
        (TINY, {"device": "cuda:99"}, UsageError, "device 'cuda:99' is not there"),
        (TINY, {"device": "meta"}, UsageError, "device 'meta' is not there"),
        (TINY, {"adapters": {"a": "/nonexistent"}}, ModelError, "/nonexistent holds no adapter_config.json"),
        (edited(model_type="alien"), {}, ModelError, "of the architecture 'alien', which transformers does not"),
        (edited(quantization_config={"quant_method": "awq"}), {}, ModelError, "is stored quantized: .*gptqmodel"),
        (edited(quantization_config={"quant_method": "awq"}), {"quantization": "4bit"}, UsageError, "stored quantized"),
        (edited(quantization_config="awq"), {}, ModelError, "is of no model that transformers reads"),
        (edited(model_type=["llama"]), {}, ModelError, "which transformers does not know"),
        (edited(num_hidden_layers=2.5), {}, ModelError, "is of no model that transformers reads"),
        ({k: v for k, v in TINY.items() if k != "tokenizer.json"}, {}, ModelError, f"{MODEL} has no tokenizer"),
        (HUGE, {"quantization": "auto"}, ModelError, f"{MODEL} in .* needs .* GiB short"),
        ({"a.gguf": b"GGUF"}, {"quantization": "4bit"}, UsageError, "a GGUF file has its own quantization"),
        (
            {f"Q4/a-{n:05}-of-00002.gguf": b"GGUF" for n in (1, 2)}, {}, ModelError,
            f"{MODEL} is a model in 2 parts, which llama.cpp alone reads: .* dsr1kit serve {MODEL}",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_the_configuration_tells_is_told_before_the_weights_come(
    hub: LoopbackHub, files: dict[str, bytes], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    hub.push(MODEL, files)
    with pytest.raises(error, match=words):
        ask(MODEL, **options)
    assert {one.path for one in hub.contents()} <= {"config.json"}


def test_an_engine_is_not_given_what_its_configuration_forbids(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(MODEL, TINY)
    with pytest.raises(UsageError, match="has a context of 1024 tokens, so 4096 cannot be served"):
        asyncio.run(Engine(MODEL, engine="transformers", context=4096).__aenter__())
    hub.push("lab/alien", edited(model_type="alien", max_position_embeddings="long"))
    with pytest.raises(ModelError, match="which transformers does not know"):
        asyncio.run(Engine("lab/alien", engine="transformers").__aenter__())
    hub.push("lab/large", {"a.gguf": b"GGUF" + bytes(5_000_000)})
    monkeypatch.setattr("dsr1kit.local.engines.look", lambda: replace(look(), gpus=(), memory_free_bytes=3_000_000))
    monkeypatch.setattr("dsr1kit.local.engine_commands._llama_server", lambda: "/bin/true")
    with pytest.raises(ModelError, match="lab/large does not fit: its files alone have"):
        asyncio.run(Engine("lab/large").__aenter__())
    assert {one.path for one in hub.contents()} <= {"config.json"}


def test_who_has_logged_in_by_the_hubs_own_client_needs_no_variable(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push("lab/gated", TINY, gated=True, token=LOGGED_IN)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(f"{LOGGED_IN}\n")
    asyncio.run(bring("lab/gated"))
    assert is_here("lab/gated")
    (tmp_path / "hf" / "token").write_text("hf_revoked")
    with pytest.raises(ModelError, match=rf"refuses the token in {tmp_path}/hf/token"):
        asyncio.run(bring("lab/gated3"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.push("lab/gated2", TINY, gated=True, token=LOGGED_IN)
    with pytest.raises(MissingKey):
        asyncio.run(bring("lab/gated2"))


def test_offline_nothing_is_asked_and_what_is_not_here_said(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(MODEL, TINY)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    words = f"{MODEL} is not on this machine, and TRANSFORMERS_OFFLINE is set.*by dsr1kit weights {MODEL}"
    with pytest.raises(ModelError, match=words):
        ask(MODEL)
    with pytest.raises(ModelError, match=words):
        asyncio.run(Engine(MODEL, engine="transformers").__aenter__())
    assert not hub.asked


def test_a_hub_that_is_not_reached_is_said_without_a_librarys_noise(hub: LoopbackHub) -> None:
    hub.push(MODEL, TINY)
    command = [sys.executable, "-m", "dsr1kit", "ask", "--local", MODEL, "hello"]
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "could not be fetched from the Hugging Face Hub (http://127.0.0.1:9)" in line
    assert "HF_ENDPOINT=https://hf-mirror.com" in line
    assert "What came is kept" not in line, "nothing came"


def test_a_missing_engine_is_told_before_anything_is_fetched_for_it(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.push(MODEL, TINY)
    hub.push("lab/packed", {"a.Q4_K_M.gguf": b"GGUF"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="vllm"):
        asyncio.run(Engine(MODEL, engine="vllm").__aenter__())
    with pytest.raises(UsageError, match="not GGUF files"):
        asyncio.run(Engine("lab/packed", engine="vllm").__aenter__())
    assert {one.path for one in hub.contents()} <= {"config.json"}


def test_an_engine_is_given_the_folder_of_what_was_fetched(hub: LoopbackHub) -> None:
    hub.push(MODEL, TINY)
    fake = [sys.executable, str(Path(__file__).with_name("fake_engine.py")), "--port", "{port}"]

    async def scenario() -> tuple[str, str]:
        async with Engine(MODEL, command=fake) as r1:
            return r1.engine, r1.channel.title

    assert asyncio.run(scenario()) == ("custom", f"{MODEL} served by your command on this machine")
    assert locate(MODEL) == (str(default_folder(MODEL, "hub")), None)


def test_a_run_fetches_its_local_models_before_it_asks_anyone(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.push(MODEL, TINY)
    command = [
        sys.executable, "-m", "dsr1kit", "compare", "--channels", f"emulated:calm,local:{MODEL}x", "--task",
        "arithmetic", "--items", "1", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 2
    assert "check the spelling" in done.stderr
    assert not (tmp_path / "run").exists(), "the corrected command may use the folder"
    hub.push("lab/huge", HUGE)
    command[5] = f"emulated:calm,local:{MODEL}@8bit,local:lab/huge"
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1
    assert "lab/huge does not fit" in done.stderr
    assert not (tmp_path / "run").exists()
    command[5] = f"local:{MODEL}"
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr


def test_no_home_is_told_as_such(hub: LoopbackHub) -> None:
    code = "import os; os.environ.pop('XDG_CACHE_HOME'); import pathlib, sys, dsr1kit.cli as c\n"
    code += "def no_home(*_): raise RuntimeError('Could not determine home directory.')\n"
    code += f"pathlib.Path.home = no_home; sys.argv = ['dsr1kit', 'fits', {MODEL!r}]; c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "there is no home directory to keep models in" in done.stderr


# --- broken off ---------------------------------------------------------------------------------------------


def test_cancelling_a_download_ends_it_at_once_and_keeps_what_came(hub: LoopbackHub) -> None:
    hub.push(MODEL, TINY)
    hub.fault("model.safetensors", Fault("stall", after=4 * PIECE))

    async def broken_off() -> float:
        opening = asyncio.ensure_future(LocalModel(MODEL).__aenter__())
        async with asyncio.timeout(60):
            while hub.sent("model.safetensors") < 4 * PIECE:  # noqa: ASYNC110 - a count, not an event
                await asyncio.sleep(0.02)
        began = time.monotonic()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        return time.monotonic() - began

    assert asyncio.run(broken_off()) < 5, "a stalled hub is waited for 30 s"
    assert not is_here(MODEL)
    assert ask(MODEL).outcome is Outcome.OK
    assert hub.of("model.safetensors")[-1].offset > 0, "the rest alone was fetched"


def test_ctrl_c_ends_a_download_that_is_waited_for_in_ordinary_code(hub: LoopbackHub) -> None:
    hub.push(MODEL, TINY)
    hub.fault("model.safetensors", Fault("stall", after=2 * PIECE))
    code = f"from dsr1kit.local.bring import bring_now\nbring_now({MODEL!r})"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        while hub.sent("model.safetensors") < 2 * PIECE:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=20)
    assert told.rstrip().endswith("KeyboardInterrupt")
    assert "never retrieved" not in told
    assert "was destroyed" not in told


def test_ordinary_code_waits_for_a_download_within_a_running_loop_too(hub: LoopbackHub) -> None:
    hub.push(MODEL, TINY)

    async def notebook() -> None:
        bring_now(MODEL)

    asyncio.run(notebook())
    assert is_here(MODEL)
    hub.push("lab/huge", HUGE)

    def refuse(coming: Any) -> None:
        raise ModelError(f"no: {coming.licence} {len(coming.files)} {coming.config['num_hidden_layers']}")

    with pytest.raises(ModelError, match=rf"^no: mit {len(HUGE)} 4000$"):
        bring_now("lab/huge", on_plan=refuse)
    assert not hub.of("model.safetensors")[1:]


# --- here already -------------------------------------------------------------------------------------------


def test_what_other_programs_left_in_the_hubs_cache_is_taken_if_it_is_whole(hub: LoopbackHub, tmp_path: Path) -> None:
    snapshot = lay_in_the_hubs_cache(tmp_path / "hf", MODEL, TINY)
    assert locate(MODEL) == (str(snapshot), None)
    assert ask(MODEL).outcome is Outcome.OK
    assert place_of(MODEL) == MODEL
    assert not hub.asked
    hub.push(MODEL, TINY)
    asyncio.run(bring(MODEL))
    assert not hub.asked
    (snapshot / "tokenizer.json").unlink()
    assert not is_here(MODEL)
    index = json.dumps({"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}).encode()
    lay_in_the_hubs_cache(tmp_path / "hf", "lab/shards", TINY | {"model.safetensors.index.json": index})
    assert not is_here("lab/shards")
    lay_in_the_hubs_cache(
        tmp_path / "hf", "lab/first", TINY | {"model-00001-of-00002.safetensors": safetensors(1000)}
    )  # fmt: skip
    assert not is_here("lab/first")
    lay_in_the_hubs_cache(tmp_path / "hf", "lab/cut", TINY | {"model.safetensors": TINY["model.safetensors"][:-1]})
    assert not is_here("lab/cut")


def test_where_the_hubs_cache_is_can_be_said_in_its_own_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = lay_in_the_hubs_cache(tmp_path / "hf", MODEL, TINY)
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    assert not is_here(MODEL)
    for name, value in (("HF_HOME", "$WHERE/hf"), ("HF_HUB_CACHE", "$WHERE/hf/hub")):
        with monkeypatch.context() as only:
            only.setenv("WHERE", str(tmp_path))
            only.setenv(name, value)
            assert locate(MODEL)[0] == str(snapshot)
    (tmp_path / "nobody" / ".cache").mkdir(parents=True)
    (tmp_path / "hf").rename(tmp_path / "nobody" / ".cache" / "huggingface")
    assert is_here(MODEL)


def test_a_model_that_is_stored_in_four_bits_opens_as_it_is(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four: Any = BitsAndBytesConfig
    config = four(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                  bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    tiny = str(data_dir() / "tiny-r1")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(str(tmp_path))
    for name in TINY.keys() - {"config.json", "model.safetensors"}:
        (tmp_path / name).write_bytes(TINY[name])
    wanted = ask("tiny-r1", quantization="4bit")
    for quantization in ("none", "auto", "4bit"):
        reply = ask(str(tmp_path), quantization=quantization)
        assert reply.answer == wanted.answer
        assert reply.extra["quantization"] == "4bit"
    with pytest.raises(UsageError, match=r"is stored quantized \(bitsandbytes\): open it with quantization='none'"):
        ask(str(tmp_path), quantization="8bit")


# --- fine-tuning --------------------------------------------------------------------------------------------


def test_a_base_is_fetched_where_it_is_first_needed(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.push(MODEL, TINY)
    assert suited(MODEL).values == suited("tiny-r1").values, "its size is known before its rows are chosen"
    tokenizer, marks = tokenizer_and_marks(MODEL)
    assert tokenizer.chat_template
    assert marks == tokenizer_and_marks("tiny-r1")[1]
    assert not hub.of("model.safetensors"), "for which no weights are needed"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": MODEL, "peft_type": "LORA", "r": 8})
    )
    (adapter / "adapter_model.safetensors").write_bytes(safetensors(100))
    assert base_of(adapter) == MODEL
    assert f"dsr1kit serve {MODEL} --adapter" in serve_commands(MODEL, adapter)["dsr1kit"]


def test_what_is_trained_notes_the_id_of_its_base_and_not_a_place_of_this_machine(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.push(MODEL, TINY)
    settings = SftSettings(model=MODEL, adapter=AdapterSettings(rank=4, alpha=8), steps=1, batch_size=2, accumulation=1)
    trained = train_sft(settings, load_examples(["worked:arithmetic:4"]), tmp_path / "run")
    assert json.loads((trained.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == MODEL
    assert ask(MODEL, adapters={"mine": trained.adapter}).outcome is Outcome.OK
    assert ask("tiny-r1", adapters={"mine": trained.adapter}).outcome is Outcome.OK, "the same weights"


def test_a_training_that_is_refused_leaves_its_folder_to_the_corrected_one(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.push("lab/huge", HUGE)
    examples = load_examples(["worked:arithmetic:4"])
    settings = SftSettings(model="lab/huge", steps=1, batch_size=2, accumulation=1)
    with pytest.raises(ModelError, match="does not fit"):
        train_sft(settings, examples, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train_sft(replace(settings, model="tiny-r1"), examples, tmp_path / "run")
    with pytest.raises(UsageError, match="holds another training"):
        train_sft(settings, examples, tmp_path / "run")
    assert (tmp_path / "run" / "run.json").exists()


def test_what_follows_from_a_models_size_is_the_same_before_and_after_it_is_fetched(hub: LoopbackHub) -> None:
    hub.push(MODEL, TINY)
    assert is_small(MODEL)
    bring_now(MODEL)
    assert is_small(MODEL)


def test_training_refuses_what_does_not_fit_before_it_is_fetched(hub: LoopbackHub) -> None:
    hub.push(MODEL, HUGE)
    suited(MODEL)
    with pytest.raises(ModelError, match="does not fit"):
        open_base(MODEL, method="lora", dtype="auto", device="cpu")
    hub.push("lab/mute", {k: v for k, v in TINY.items() if k != "tokenizer.json"})
    with pytest.raises(ModelError, match="lab/mute has no tokenizer"):
        tokenizer_and_marks("lab/mute")
    hub.push("lab/words", TINY | {"tokenizer.json": b"{}"})
    with pytest.raises(ModelError, match="could not load lab/words"):
        tokenizer_and_marks("lab/words")
    hub.push("lab/odd", edited(num_experts="many"))
    assert suited("lab/odd").values["max_length"] == 2048, "of a size that is not known"
    assert not hub.of("model.safetensors")


# --- what fits ----------------------------------------------------------------------------------------------


def test_what_fits_is_told_of_any_hub_id_by_its_configuration_alone(hub: LoopbackHub) -> None:
    hub.push("lab/any-7B", HUGE)

    def fits(model: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dsr1kit", "fits", model, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = fits("lab/any-7B", "--on", "t4")
    assert done.returncode == 1, "so large a model fits nowhere"
    assert "lab/any-7B in q4_k_m needs" in done.stderr
    assert "DeepSeek-R1-Distill" in done.stderr
    assert {one.path for one in hub.contents()} == {"config.json"}
    hub.push(MODEL, TINY)
    done = fits(MODEL, "--on", "t4", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["recommended"]["value"] == "R1-tiny fp16"
    assert told["recommended"]["commands"][0] == f"dsr1kit weights {MODEL}"
    bring_now(MODEL)
    asked = len(hub.asked)
    assert "dsr1kit weights" not in fits(MODEL, "--on", "t4").stdout
    assert len(hub.asked) == asked
    hub.push("lab/packed", {"a.Q4_K_M.gguf": b"GGUF"})
    assert "lab/packed has no config.json" in fits("lab/packed").stderr
    hub.push("lab/awq", edited(quantization_config={"quant_method": "awq"}))
    assert "lab/awq is stored quantized (awq)" in fits("lab/awq").stderr
    hub.push("lab/fp8", edited(quantization_config={"quant_method": "fp8"}))
    told = json.loads(fits("lab/fp8", "--on", "t4", "--json").stdout)
    assert {fit["precision"]: fit["possible"] for fit in told["fits"]}["nf4"] is False
    assert "--quantization" not in told["recommended"]["commands"][1]
    hub.push("lab/pickled", {"config.json": TINY["config.json"], "pytorch_model.bin": b"x"})
    assert "only as pickles" in fits("lab/pickled").stderr
    hub.push("lab/odd", edited(num_experts="many"))
    assert "no usable num_experts ('many')" in fits("lab/odd").stderr
    wide = edited(hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40)
    hub.push("lab/R1-large", wide)
    told = json.loads(fits("lab/R1-large", "--on", "t4", "--json").stdout)["recommended"]
    assert told["value"] == "R1-large nf4", "not the first that fits, LLM.int8, but what decodes fastest"
    told = json.loads(fits("lab/R1-large", "--on", "cpu-16gb", "--json").stdout)["recommended"]
    assert told["value"] == "R1-large q4_k_m"
    (line,) = told["commands"]
    assert line.startswith("# a GGUF repository of it, often called R1-large-GGUF")
    done = fits("lab/misspelled")
    assert done.returncode == 2
    assert "check the spelling" in done.stderr
