"""Keys are found in the environment or in Colab's secrets and redacted wherever text leaves the kit."""

from __future__ import annotations

import json
import sys
import threading
import time
import types

import pytest

from dsr1kit import keys
from dsr1kit.errors import MissingKey, UsageError

SECRET = "q8Zr-vault-91x-hemlock"  # noqa: S105 - nobody's


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.setattr(keys, "_used", set())
    monkeypatch.setattr(keys, "_colab_asking", None)
    monkeypatch.delenv("MY_R1", raising=False)


@pytest.fixture
def colab(monkeypatch):
    """Puts a fake google.colab in place whose userdata.get is the function given."""

    def install(get):
        package, module = types.ModuleType("google"), types.ModuleType("google.colab")
        userdata = types.ModuleType("google.colab.userdata")
        userdata.get, module.userdata, package.colab = get, userdata, module
        for part in (package, module, userdata):
            monkeypatch.setitem(sys.modules, part.__name__, part)
        monkeypatch.setattr(keys, "_COLAB_WAIT_S", 0.1)

    return install


def test_a_key_comes_from_the_environment_without_its_white_space(monkeypatch):
    monkeypatch.setenv("MY_R1", f"  {SECRET}\n")
    assert keys.find_key("MY_R1") == keys.require_key("MY_R1", "c") == SECRET


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_key_names_variable_and_channel_and_the_fix(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("MY_R1", value)
    assert keys.find_key("MY_R1") is None
    with pytest.raises(MissingKey, match=r"'deepseek'.*MY_R1.*export MY_R1="):
        keys.require_key("MY_R1", "deepseek")


@pytest.mark.parametrize("value", ["sk-one\nsk-two-0123", "“sk-0123456789”", "密钥0123456789"])
def test_a_key_that_no_header_can_carry_is_told_without_showing_it(monkeypatch, value):
    monkeypatch.setenv("MY_R1", value)
    with pytest.raises(UsageError, match="MY_R1") as error:
        keys.require_key("MY_R1", "c")
    assert "0123" not in str(error.value)


def test_used_keys_and_secret_variables_are_redacted(monkeypatch):
    monkeypatch.setenv("MY_R1", SECRET)
    assert keys.redact(f"a {SECRET} b") == f"a {SECRET} b"  # not known to be a key yet
    keys.find_key("MY_R1")
    monkeypatch.setenv("OTHER_API_KEY", "another-value-77")
    text = json.dumps({"error": f"bad key {SECRET}", "also": ["another-value-77"]})
    assert keys.redact(text) == text.replace(SECRET, keys.REDACTED).replace("another-value-77", keys.REDACTED)


def test_a_key_inside_a_longer_key_leaves_nothing_behind(monkeypatch):
    monkeypatch.setenv("A_KEY", "abcdefgh12")
    monkeypatch.setenv("B_KEY", "abcdefgh12-and-more-34")
    assert keys.redact("x abcdefgh12-and-more-34 y") == f"x {keys.REDACTED} y"


@pytest.mark.parametrize(
    "key",
    [
        "sk-0123456789abcdef0123456789abcdef",
        "sk-proj-AbCdEfGh12345678_IjKlMnOp-qrst",
        "sk-or-v1-0123456789abcdef0123456789abcdef",
        "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",
        "gsk_abcdefghijklmnopqrstuvwxyzabcdefgh",
        "nvapi-AbCdEf0123456789AbCdEf",
        "AKIAIOSFODNN7EXAMPLE",
    ],
)
def test_what_looks_like_a_key_is_redacted(key):
    assert key not in keys.redact(f"failed with {key}.")
    assert keys.redact(f'{{"Authorization": "Bearer {key}"}}') == '{"Authorization": "Bearer [redacted]"}'


@pytest.mark.parametrize(
    "text",
    [
        "task-oriented dialogue, risk-averse-and-slow agents",
        "skateboarding-competition and sketches_of_something",
        "sk-learn-contrib-pipelines",
        "/home/someone/data/hf-internal-testing/tiny-random-Qwen2",
        "https://huggingface.co/hf-internal-testing/tiny-random-LlamaForCausalLM",
        "pkg_resources_extra_things",
        "fw_microbatch_size_per_gpu",
        "Bearer authentication is required; a bearer certificate",
        '{"sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "run": "2026-11-23"}',
        "0b6f3c1e-8d0a-4f4e-9b7b-2f5d1c9a7e10",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "<think>17 + 25 = 42</think>",
    ],
)
def test_ordinary_text_is_left_alone(text):
    assert keys.redact(text) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("MY_API_KEY", "x", "x marks the box"),
        ("MY_API_KEY", "EMPTY", "EMPTY"),
        ("TOKENIZERS_PARALLELISM", "false", "false"),
        ("SSL_KEY_FILE", "/etc/ssl/private/key.pem", "cannot read /etc/ssl/private/key.pem"),
    ],
)
def test_short_values_and_paths_are_no_secrets(monkeypatch, name, value, text):
    monkeypatch.setenv(name, value)
    assert keys.redact(text) == text


def test_colabs_secrets_are_asked_after_the_environment(colab, monkeypatch):
    colab(lambda name: f"{name}-from-colab")
    assert keys.find_key("MY_R1") == "MY_R1-from-colab"
    assert keys.REDACTED in keys.redact("MY_R1-from-colab")
    monkeypatch.setenv("MY_R1", SECRET)
    assert keys.find_key("MY_R1") == SECRET


@pytest.mark.parametrize("error", [KeyError("none"), SystemExit(1), KeyboardInterrupt()])
def test_colab_raising_means_no_key(colab, error):
    def get(name):
        raise error

    colab(get)
    assert keys.find_key("MY_R1") is None


def test_colab_blocking_costs_one_short_wait_and_no_more(colab):
    answered, asked = threading.Event(), []

    def get(name):
        asked.append(name)
        answered.wait(30)
        return SECRET

    colab(get)
    begin = time.monotonic()
    assert [keys.find_key("MY_R1") for _ in range(100)] == [None] * 100
    assert time.monotonic() - begin < 5  # 100 waits would be ten seconds
    assert asked == ["MY_R1"]
    answered.set()
    keys._colab_asking.join(5)
    assert keys.find_key("MY_R1") == SECRET  # the dialogue was answered meanwhile
