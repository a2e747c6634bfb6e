"""The shipped catalogue says what is known of every place and nothing else; what is open, to fill in or retired."""

from __future__ import annotations

import datetime as dt
import socket
from dataclasses import replace

import pytest
from scripted import free_port

from dsr1kit import load_channels
from dsr1kit.access.channels import Channel
from dsr1kit.access.prices import Price
from dsr1kit.errors import ConfigError

UTC = dt.UTC
MINE = '[channel.mine]\nbase_url = "http://127.0.0.1:8000/v1"\nmodel = "r1"\n'
SHIPPED = load_channels()
LAST_READ = dt.date(2026, 11, 23)
DASHSCOPE = "https://dashscope.aliyuncs.com/compatible-mode/v1"


def place(url, key, model, *, family="r1", reasoning="auto", price=None, context=None, out=None, retires=None,
          region="", fill_in=(), rpm=None, tpm=None, flight=None, tariff="", balance=""):  # fmt: skip
    """What is known of a place; what is not known is absent."""
    return {
        "base_urls": (url,) if url else (), "api_key_env": key, "model": model, "family": family,
        "reasoning": reasoning, "price": price, "context": context, "max_output": out, "retires": retires,
        "region": region, "fill_in": fill_in, "requests_per_minute": rpm, "tokens_per_minute": tpm,
        "max_in_flight": flight, "tariff": tariff, "balance_path": balance,
    }  # fmt: skip


def bailian(model, **known):
    return place(DASHSCOPE, "DASHSCOPE_API_KEY", model, reasoning="reasoning_content", region="cn", **known)


def own(url, model, reasoning="auto", family="r1-distill"):
    price = (0.0, 0.0, "USD")
    return place(url, "", model, family=family, reasoning=reasoning, price=price, region="local")


OFF = dt.date(2026, 10, 10)
DEEPSEEK = {"reasoning": "reasoning_content", "region": "cn"}
NOW = {"family": "successor", "context": 1_000_000, "out": 384_000, "tariff": "deepseek-peak"}
FACTS = {
    "deepseek": place(
        "https://api.deepseek.com", "DEEPSEEK_API_KEY", "deepseek-flash", price=(0.15, 0.6, "USD"), flight=2500,
        balance="/user/balance", **DEEPSEEK, **NOW),
    "deepseek-pro": place(
        "https://api.deepseek.com", "DEEPSEEK_API_KEY", "deepseek-v4-pro", price=(0.66, 1.98, "USD"), flight=500,
        balance="/user/balance", **DEEPSEEK, **NOW),
    "deepseek-reasoner": place(
        "https://api.deepseek.com", "DEEPSEEK_API_KEY", "deepseek-reasoner",
        retires=dt.datetime(2026, 7, 24, 15, 59, tzinfo=UTC), **DEEPSEEK),
    "bailian": bailian("deepseek-r1", price=(0.574, 2.294, "USD"), context=131072, out=16384, retires=OFF),
    "bailian-0528": bailian("deepseek-r1-0528", price=(0.574, 2.294, "USD"), context=131072, out=16384, retires=OFF),
    "bailian-distill-1-5b": bailian("deepseek-r1-distill-qwen-1.5b", family="r1-distill", rpm=60, tpm=100_000),
    "bailian-distill-7b": bailian("deepseek-r1-distill-qwen-7b", family="r1-distill", retires=OFF),
    "bailian-distill-14b": bailian("deepseek-r1-distill-qwen-14b", family="r1-distill", retires=OFF),
    "bailian-distill-32b": bailian("deepseek-r1-distill-qwen-32b", family="r1-distill", retires=OFF),
    "modelscope": place(
        "https://api-inference.modelscope.cn/v1", "MODELSCOPE_API_KEY", "deepseek-ai/DeepSeek-R1-0528", region="cn"),
    "tencent-lkeap": place(
        "https://api.lkeap.cloud.tencent.com/v1", "", "deepseek-r1", context=96_000, out=16_000, rpm=15_000,
        tpm=1_200_000, region="cn", fill_in=("api_key_env",)),
    "tencent-tokenhub": place(
        "https://tokenhub.tencentmaas.com/v1", "TENCENT_TOKENHUB_API_KEY", "", family="successor", region="cn",
        fill_in=("model",)),
    "huawei": place(
        "", "MAAS_API_KEY", "deepseek-r1-250528", price=(0.55, 2.2, "USD"), retires=dt.date(2026, 8, 15),
        fill_in=("base_url",)),
    "volcengine": place(
        "https://ark.cn-beijing.volces.com/api/v3", "ARK_API_KEY", "deepseek-r1-250528", price=(4.0, 16.0, "CNY"),
        context=128_000, out=32_000, region="cn"),
    "siliconflow": place(
        "https://api.siliconflow.com/v1", "SILICONFLOW_API_KEY", "deepseek-ai/DeepSeek-R1",
        price=(0.5, 2.18, "USD"), context=164_000),
    "siliconflow-cn": place(
        "https://api.siliconflow.cn/v1", "SILICONFLOW_CN_API_KEY", "deepseek-ai/DeepSeek-R1", context=164_000,
        region="cn"),
    "qianfan": place(
        "https://qianfan.baidubce.com/v2", "", "", family="other", region="cn", fill_in=("model", "api_key_env")),
    "bedrock": place(
        "https://bedrock-runtime.us-east-1.amazonaws.com", "AWS_BEARER_TOKEN_BEDROCK", "us.deepseek.r1-v1:0",
        price=(1.35, 5.4, "USD"), context=128_000, out=8192, region="us"),
    "azure": place(
        "", "AZURE_API_KEY", "DeepSeek-R1", price=(1.35, 5.4, "USD"), context=163840,
        retires=dt.date(2026, 8, 13), fill_in=("base_url",)),
    "azure-0528": place(
        "", "AZURE_API_KEY", "DeepSeek-R1-0528", price=(1.35, 5.4, "USD"), context=163840,
        retires=dt.date(2026, 7, 13), fill_in=("base_url",)),
    "vertex": place(
        "", "", "deepseek-ai/deepseek-r1-0528-maas", price=(1.35, 5.4, "USD"), context=163840, out=32768,
        retires=dt.date(2026, 10, 21), region="us-central1", fill_in=("base_url", "api_key_env")),
    "together": place(
        "", "TOGETHER_API_KEY", "deepseek-ai/DeepSeek-R1", reasoning="inline", price=(3.0, 7.0, "USD"),
        context=163839, fill_in=("base_url",)),
    "fireworks": place(
        "https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY", "accounts/fireworks/models/deepseek-r1-0528",
        price=(3.0, 8.0, "USD"), context=160_000, retires=dt.date(2026, 2, 18)),
    "openrouter": place(
        "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", "deepseek/deepseek-r1-0528", reasoning="reasoning",
        price=(0.5, 2.15, "USD"), context=163840, out=32768),
    "openrouter-r1": place(
        "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", "deepseek/deepseek-r1", reasoning="reasoning",
        price=(0.7, 2.5, "USD"), context=64_000, out=16_000),
    "groq-distill-70b": place(
        "", "GROQ_API_KEY", "deepseek-r1-distill-llama-70b", family="r1-distill", price=(0.75, 0.99, "USD"),
        retires=dt.date(2026, 6, 10), fill_in=("base_url",)),
    "nebius": place(
        "https://api.tokenfactory.nebius.com/v1", "NEBIUS_API_KEY", "deepseek-ai/DeepSeek-R1-0528",
        price=(0.8, 2.4, "USD"), retires=dt.date(2026, 5, 7)),
    "novita": place(
        "https://api.novita.ai/openai", "NOVITA_API_KEY", "deepseek/deepseek-r1-0528", price=(0.7, 2.5, "USD"),
        context=163840, out=32768),
    "deepinfra": place(
        "", "DEEPINFRA_API_KEY", "deepseek-ai/DeepSeek-R1-0528", reasoning="reasoning_content",
        price=(0.5, 2.15, "USD"), context=163840, fill_in=("base_url",)),
    "hf-router": place(
        "https://router.huggingface.co/v1", "HF_TOKEN", "deepseek-ai/DeepSeek-R1-0528", price=(3.0, 5.0, "USD"),
        context=163840),
    "nvidia": place(
        "https://integrate.api.nvidia.com/v1", "NVIDIA_API_KEY", "deepseek-ai/deepseek-r1-0528",
        retires=dt.date(2026, 5, 3)),
    "cloudflare-distill-32b": place(
        "", "CLOUDFLARE_API_KEY", "@cf/deepseek-ai/deepseek-r1-distill-qwen-32b", family="r1-distill",
        price=(0.497, 4.881, "USD"), context=80_000, fill_in=("base_url",)),
    "vllm": own("http://127.0.0.1:8000/v1", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
    "sglang": own("http://127.0.0.1:30000/v1", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
    "llama-cpp": own("http://127.0.0.1:8080/v1", "deepseek-r1-distill"),
    "ollama": own("http://127.0.0.1:11434/v1", "deepseek-r1:1.5b"),
    "lmstudio": own("http://127.0.0.1:1234/v1", "deepseek-r1-distill-qwen-7b"),
    "transformers-serve": own(
        "http://127.0.0.1:8000/v1", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", reasoning="inline"),
}  # fmt: skip


# What is shipped.
def test_every_known_place_is_shipped_and_no_other():
    assert set(SHIPPED) == set(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_an_entry_says_what_is_known_of_the_place_and_nothing_else(name):
    channel = SHIPPED[name]
    said = {field: getattr(channel, field) for field in FACTS[name]}
    if channel.price is not None:
        said["price"] = (channel.price.input, channel.price.output, channel.price.currency)
    assert said == FACTS[name]
    assert (channel.proxy, channel.availability, channel.emulated, channel.weight) == ("", None, False, 1.0)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_entry_says_where_and_when_its_facts_were_read(name):
    channel = SHIPPED[name]
    assert channel.title != name
    assert channel.source.strip()
    assert channel.as_of is not None
    assert channel.as_of <= LAST_READ
    if channel.price is not None and not channel.price.free:
        assert channel.price.as_of is not None
        assert channel.price.as_of <= channel.as_of
    if channel.peak is not None:
        assert channel.peak.source
        assert channel.peak.as_of is not None


def test_only_your_own_entries_are_free_and_local():
    local = {name for name, c in SHIPPED.items() if all("//127.0.0.1" in url for url in c.base_urls) and c.base_urls}
    assert local == {name for name, c in SHIPPED.items() if c.price is not None and c.price.free}
    assert all(not SHIPPED[name].retires and not SHIPPED[name].api_key_env for name in local)


def test_only_bedrock_speaks_another_protocol():
    assert {n for n, c in SHIPPED.items() if c.protocol != "chat-completions"} == {"bedrock"}


def test_what_was_retired_when_the_catalogue_was_read_is_retired_and_the_rest_is_not():
    retired = {name for name, facts in FACTS.items() if facts["retires"] is not None}
    assert {n for n, c in SHIPPED.items() if c.retired_on(dt.datetime(2026, 11, 23, tzinfo=UTC))} == retired
    assert SHIPPED["deepseek-reasoner"].retired_on(dt.datetime(2026, 7, 24, 15, 58, 59, tzinfo=UTC)) == ""


# What a person has to fill in.
TO_FILL_IN = {name: facts["fill_in"] for name, facts in FACTS.items() if facts["fill_in"]}
FILLED = {"base_url": "https://r1.example/v1", "model": "my-r1", "api_key_env": "MY_R1_KEY"}


@pytest.mark.parametrize("name", TO_FILL_IN)
def test_an_entry_to_fill_in_is_not_opened_and_says_what_to_put_where(name):
    with pytest.raises(ConfigError) as error:
        SHIPPED[name].open()
    message = str(error.value)
    assert f"[channel.{name}]" in message
    assert "--channel-file" in message
    assert "DSR1KIT_CHANNELS" in message
    assert all(field in message for field in TO_FILL_IN[name])
    assert SHIPPED[name].note in message


@pytest.mark.parametrize("name", TO_FILL_IN)
def test_an_own_file_with_those_fields_completes_the_entry(load, name):
    lines = [f'{field} = "{FILLED[field]}"' for field in TO_FILL_IN[name]]
    mine = load(f"[channel.{name}]\n" + "\n".join(lines))[name]
    mine.open()
    given = {field: FILLED[field] for field in TO_FILL_IN[name]}
    if "base_url" in given:
        given["base_urls"] = (given.pop("base_url"),)
    assert mine == replace(SHIPPED[name], fill_in=(), **given)


def test_half_of_what_is_to_fill_in_leaves_the_rest_to_fill_in(load):
    mine = load('[channel.vertex]\nbase_url = "https://r1.example/v1"\n')["vertex"]
    assert mine.fill_in == ("api_key_env",)
    with pytest.raises(ConfigError, match=r"put api_key_env under \[channel\.vertex\]"):
        mine.open()


def test_several_addresses_complete_an_entry_that_lacks_one(load):
    mine = load('[channel.together]\nbase_urls = ["https://a.example/v1", "https://b.example/v1"]\n')["together"]
    assert (mine.fill_in, mine.base_urls) == ((), ("https://a.example/v1", "https://b.example/v1"))
    mine.open()


@pytest.mark.parametrize("field", ["base_url", "model"])
def test_an_empty_value_completes_nothing(load, field):
    name = next(n for n, wanted in TO_FILL_IN.items() if field in wanted)
    with pytest.raises(ConfigError, match=rf"\[channel\.{name}\] {field}: must not be empty"):
        load(f'[channel.{name}]\n{field} = " "\n')


# Retirement.
DAY = dt.timedelta(days=1)


@pytest.mark.parametrize(
    ("retires", "moment"),
    [
        (dt.date(2026, 7, 1), dt.datetime(2026, 7, 1, tzinfo=UTC)),
        (dt.datetime(2026, 7, 1, 15, 59), dt.datetime(2026, 7, 1, 15, 59, tzinfo=UTC)),
        (dt.datetime(2026, 7, 1, 15, 59, tzinfo=UTC), dt.datetime(2026, 7, 1, 15, 59, tzinfo=UTC)),
        (
            dt.datetime(2026, 7, 1, 2, 0, tzinfo=dt.timezone(dt.timedelta(hours=8))),
            dt.datetime(2026, 6, 30, 18, 0, tzinfo=UTC),
        ),
    ],
)
def test_a_retirement_is_warned_of_in_its_last_thirty_days_and_then_told(retires, moment):
    channel = Channel(name="c", base_urls=("http://h/v1",), model="r1", retires=retires)
    assert channel.retires_at() == moment

    def at(left):
        return channel.retirement_warning(moment - left), channel.retired_on(moment - left)

    assert at(31 * DAY) == at(30 * DAY + dt.timedelta(microseconds=1)) == ("", "")
    for left, told in [
        (30 * DAY, "in 30 days"),
        (2 * DAY, "in 2 days"),
        (DAY + dt.timedelta(hours=23), "in a day"),
        (DAY, "in a day"),
        (DAY - dt.timedelta(seconds=1), "in less than a day"),
        (dt.timedelta(microseconds=1), "in less than a day"),
    ]:
        warning, retired = at(left)
        assert f"retires r1 on 2026-07-01, {told}:" in warning
        assert retired == ""
    assert at(0 * DAY) == at(-1 * DAY) == at(-400 * DAY) == ("", "2026-07-01")


def test_a_channel_without_a_known_retirement_is_never_retired():
    channel = Channel(name="c", base_urls=("http://h/v1",), model="r1")
    far = dt.datetime(2999, 1, 1, tzinfo=UTC)
    assert (channel.retires_at(), channel.retired_on(far), channel.retirement_warning(far)) == (None, "", "")


# What closes a channel.
def channel(**fields):
    return Channel(**{"name": "c", "base_urls": ("https://r1.example/v1",), "model": "r1", **fields})


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_channel_is_open_when_nothing_is_known_to_close_it(monkeypatch):
    monkeypatch.setenv("C_KEY", "sk-0123456789abcdef0123")
    assert channel().closed_because() == ""
    assert channel(api_key_env="C_KEY").closed_because() == ""


def test_a_missing_key_closes_it_and_is_named(monkeypatch):
    monkeypatch.delenv("C_KEY", raising=False)
    assert channel(api_key_env="C_KEY").closed_because() == "needs C_KEY"
    monkeypatch.setenv("C_KEY", "   ")
    assert channel(api_key_env="C_KEY").closed_because() == "needs C_KEY"


def test_retirement_closes_it_before_anything_else_does(monkeypatch):
    monkeypatch.delenv("C_KEY", raising=False)
    closed = channel(retires=dt.date(2026, 7, 1), fill_in=("base_url",), base_urls=(), api_key_env="C_KEY")
    assert closed.closed_because(dt.datetime(2026, 7, 1, tzinfo=UTC)) == "retired 2026-07-01"
    assert closed.closed_because(dt.datetime(2026, 6, 30, tzinfo=UTC)) == "fill in base_url"
    assert replace(closed, fill_in=()).closed_because(dt.datetime(2026, 6, 30, tzinfo=UTC)) == "needs C_KEY"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_on_this_machine_is_open_while_it_listens(host, listening):
    assert channel(base_urls=(f"http://{host}:{listening}/v1",)).closed_because() == ""
    assert channel(base_urls=(f"http://{host}:{free_port()}/v1",)).closed_because() == "not running"


def test_one_of_several_servers_on_this_machine_is_enough(listening):
    dead = f"http://127.0.0.1:{free_port()}/v1"
    assert channel(base_urls=(dead, f"http://127.0.0.1:{listening}/v1")).closed_because() == ""
    assert channel(base_urls=(dead, dead)).closed_because() == "not running"
    assert channel(base_urls=(dead, "https://r1.example/v1")).closed_because() == ""  # one that is not looked for


def test_a_host_whose_name_begins_like_an_address_of_this_machine_is_not_looked_for():
    assert channel(base_urls=("http://127.r1.example/v1",)).closed_because() == ""


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_the_port_looked_for_is_that_of_the_scheme(scheme, port, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "create_connection", lambda address, **_: asked.append(address) or socket.socket())
    assert channel(base_urls=(f"{scheme}://127.0.0.1/v1",)).closed_because() == ""
    assert asked == [("127.0.0.1", port)]


def test_an_emulated_channel_is_open_before_its_server_runs():
    assert channel(base_urls=(f"http://127.0.0.1:{free_port()}/v1",), emulated=True).closed_because() == ""


@pytest.mark.parametrize("name", TO_FILL_IN)
def test_shipped_entries_to_fill_in_say_what_until_they_retire(name):
    closed = SHIPPED[name].closed_because(dt.datetime(2026, 1, 1, tzinfo=UTC))
    assert closed.startswith("fill in ")
    assert all(field in closed for field in TO_FILL_IN[name])


# Mistakes in one's own file.
LOGIN = "s3cr3t-p4ss"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (MINE + "availability = 1.5\n", "availability: expected a number from 0 to 1, not 1.5"),
        (MINE + "availability = 99.95\n", "availability: expected a number from 0 to 1"),
        (MINE + "availability = -0.1\n", "availability: expected a number from 0 to 1"),
        (MINE + 'as_of = "2026-11-23"\n', "as_of: expected a date such as 2026-11-23, without quotes"),
        (MINE + "tokens_per_minute = 0\n", "tokens_per_minute: expected a number"),
        (MINE + "context = 0\n", "context: expected a whole number of at least 1"),
        (MINE + "weight = nan\n", "weight: expected a number"),
        (MINE + "backup = 1\n", "backup: expected true or false"),
        (MINE + 'protocol = "messages"\n', "protocol: expected one of chat-completions, bedrock-converse"),
        (MINE + "fill_in = 3\n", "fill_in: expected a list of strings"),
        (MINE + "emulated = true\n", "emulated: unknown key 'emulated'"),
        (MINE + 'api_key = "K"\n', "did you mean 'api_key_env'"),
        (MINE + 'balance_path = ["x"]\n', "balance_path: expected a string"),
        (MINE + 'proxy = "127.0.0.1:8080"\n', "proxy: expected a URL that begins with http:// or https://"),
        (MINE + 'proxy = "http://"\n', "proxy: expected a URL that begins with http:// or https:// and names a host"),
        ('[channel.mine]\nmodel = "m"\nbase_url = "//h.example/v1"\n', "base_url: expected a URL that begins"),
    ],
)
def test_a_mistake_in_an_own_entry_is_told_with_its_place(load, text, told):
    with pytest.raises(ConfigError) as error:
        load(text)
    assert "my.toml: [channel.mine] " in str(error.value)
    assert told in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        f'base_url = "https://me:{LOGIN}@h.example/v1"',
        f'base_url = "https://{LOGIN}@h.example/v1#top"',
        f'base_url = "https://h.example/v1?key={LOGIN}#top"',
        f'base_url = "me:{LOGIN}@h.example/v1"',
        f'base_url = "https://me:{LOGIN}@h.example:port/v1"',
        f'base_url = "https://me:{LOGIN}@[::1/v1"',
        f'base_url = ["https://me:{LOGIN}@h.example/v1"]',
        f'base_urls = ["https://h.example/v1", "https://me:{LOGIN}@h.example/v1"]',
        f'base_urls = "https://me:{LOGIN}@h.example/v1"',
        f'base_urls = ["https://me:{LOGIN}@h.example/v1", 3]',
        f'base_url = "https://h.example/v1"\nproxy = "socks5://me:{LOGIN}@h.example:1"',
        f'base_url = "https://h.example/v1"\nproxy = "http://me:{LOGIN}@h.example:1#top"',
        f'base_url = "https://h.example/v1"\nproxy = "http://me:{LOGIN}@h.example:1/ü"',
        f'base_url = "https://h.example/v1"\nproxy = "http://me:{LOGIN}@h.example:123456"',
        f'base_url = "https://h.example/v1"\nproxy = ["http://me:{LOGIN}@h.example:1"]',
    ],
)
def test_credentials_in_addresses_never_show(load, line):
    with pytest.raises(ConfigError) as error:
        load(f'[channel.mine]\nmodel = "m"\n{line}\n')
    assert LOGIN not in str(error.value)
    assert "my.toml: [channel.mine] " in str(error.value)


def test_a_proxy_s_login_is_not_in_what_is_shown_of_a_channel(load):
    mine = load(MINE + f'proxy = "http://me:{LOGIN}@127.0.0.1:8080"\n')["mine"]
    assert LOGIN in mine.proxy
    assert LOGIN not in repr(mine)


def test_prices_without_a_tariff_stay_as_they_are_written(load):
    mine = load(MINE + "price = {input = 1, output = 2.5}\n")["mine"]
    assert mine.price == Price(1.0, 2.5)
    assert (mine.peak, mine.tariff) == (None, "")
