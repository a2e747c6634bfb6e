"""LoRA adapters on tiny-r1: as if merged, swapped between requests, refused where they do not belong."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil

import pytest

from dsr1kit import LocalModel, Sampling
from dsr1kit.errors import ModelError, UnknownName
from dsr1kit.local.graphs import Graphs
from dsr1kit.local.slots import read_one
from dsr1kit.paths import data_dir

pytest.importorskip("peft", reason="adapters are PEFT's")

GREEDY = Sampling(temperature=0, max_tokens=60)
QUESTION = [{"role": "user", "content": "What is 4827 + 965?"}]


def base(**changed):
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    folder = data_dir() / "tiny-r1"
    if not changed:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Qwen2ForCausalLM(Qwen2Config(**json.loads((folder / "config.json").read_text()) | changed))


def lora(folder, seed, *, merged=False, dora=False, **changed):
    """A random adapter on tiny-r1 (or on a model that is `changed`), strong enough to turn its words; its folder."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = get_peft_model(base(**changed), LoraConfig(task_type="CAUSAL_LM", use_dora=dora, **options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.25)
    model.save_pretrained(folder)
    if merged:
        place = folder.parent / f"{folder.name}-merged"
        model.merge_and_unload().save_pretrained(place)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(data_dir() / "tiny-r1" / file, place)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: lora(root / name, seed, merged=True) for seed, name in enumerate(("first.v1", "model"))}


def run(scenario, source="tiny-r1", **options):
    async def inside():
        async with LocalModel(source, **{"threads": 1, "dtype": "float32", **options}) as model:
            return await scenario(model)

    return asyncio.run(inside())


def said(reply):
    return reply.reasoning, reply.answer


def test_an_adapter_says_what_the_merged_model_says_and_swaps_without_loading(adapters):
    async def ask(model):
        return said(await model.ask(QUESTION, GREEDY))

    async def scenario(model):
        plain, facts = await ask(model), []
        replies = {}
        names = [await model.load_adapter(folder) for folder in adapters.values()]
        for name in [*names, None, *reversed(names), None]:
            await model.use_adapter(name)
            assert model.adapter == name
            reply = await model.ask(QUESTION, GREEDY)
            facts.append((name, reply.extra.get("adapter")))
            replies.setdefault(name, set()).add(said(reply))
            (many,) = await model.generate_many([QUESTION], [GREEDY])
            assert said(many) == said(reply)
            assert many.extra.get("adapter") == name
        return plain, names, replies, facts

    plain, names, replies, facts = run(scenario)
    assert names == ["first.v1", "model"]
    assert all(name == told for name, told in facts)
    assert {name: len(texts) for name, texts in replies.items()} == {None: 1, "first.v1": 1, "model": 1}
    assert replies[None] == {plain}
    assert len(set.union(*replies.values())) == 3
    for name, folder in adapters.items():
        assert replies[name] == {run(ask, source=folder.parent / f"{folder.name}-merged")}


def test_the_magnitudes_of_a_dora_are_in_use_and_those_of_each_its_own(tmp_path):
    folders = {name: lora(tmp_path / name, seed, merged=True, dora=True) for seed, name in enumerate(("one", "two"))}

    async def swapped(model):
        found = {}
        for name in folders:
            await model.use_adapter(name)
            found[name] = said(await model.ask(QUESTION, GREEDY))
        return found

    async def once(model):
        return said(await model.ask(QUESTION, GREEDY))

    found = run(swapped, adapters=folders)
    for name in folders:
        assert found[name] == run(once, str(tmp_path / f"{name}-merged"))
    assert found["one"] != found["two"]


def test_adapters_named_on_opening_are_loaded_and_the_first_is_in_use(adapters):
    async def scenario(model):
        one = await model.ask(QUESTION, GREEDY)
        await model.use_adapter("b")
        return one, await model.ask(QUESTION, GREEDY), model.adapter

    one, other, name = run(scenario, adapters={"a": adapters["first.v1"], "b": adapters["model"]})
    assert (one.extra["adapter"], other.extra["adapter"], name) == ("a", "b", "b")
    assert said(one) != said(other)


def test_requests_finish_on_the_adapter_that_they_were_made_under(adapters):
    async def scenario(model):
        name = await model.load_adapter(adapters["model"])
        new = said(await model.ask(QUESTION, GREEDY))
        await model.use_adapter(None)
        old = said(await model.ask(QUESTION, GREEDY))
        first = asyncio.Event()
        running = asyncio.ensure_future(model.ask(QUESTION, GREEDY, on_delta=lambda _: first.set()))
        waiting = asyncio.ensure_future(model.ask(QUESTION, GREEDY))  # only one runs at a time
        batch = asyncio.ensure_future(model.generate_many([QUESTION] * 2, [GREEDY] * 2, batch_size=1))
        await first.wait()
        swap = asyncio.ensure_future(model.use_adapter(name))
        await asyncio.sleep(0)
        after = asyncio.ensure_future(model.ask(QUESTION, GREEDY))  # while the switch is still to come
        replies = [await running, await waiting, *await batch, await after]
        await swap
        return old, new, replies

    old, new, replies = run(scenario, max_batch=1)
    assert [said(reply) for reply in replies] == [old] * 4 + [new]
    assert [reply.extra.get("adapter") for reply in replies] == [None] * 4 + ["model"]


def test_recorded_steps_do_not_outlive_the_adapter_that_they_were_recorded_with(adapters, monkeypatch):
    """A recording replays the work of its own time; here a copy of the model stands for it, as there is no GPU."""

    class Frozen(Graphs):
        def _recording(self, ids, at, reach):
            held_ids, held_at = ids.clone(), at.clone()
            then, cache = copy.deepcopy(self._model), self._cache
            scores = read_one(then, cache, held_ids, held_at, reach)

            class Recording:
                def replay(self):
                    scores.copy_(read_one(then, cache, held_ids, held_at, reach))

            return Recording(), held_ids, held_at, scores

    async def scenario(model):
        said_by = {}
        names = [None, *[await model.load_adapter(folder) for folder in adapters.values()]]
        for name in [*names, *names]:
            await model.use_adapter(name)
            said_by.setdefault(name, set()).add(said(await model.ask(QUESTION, GREEDY)))
        return said_by

    eager = run(scenario)
    with monkeypatch.context() as patch:
        patch.setattr("dsr1kit.local.graphs.Graphs", Frozen)
        assert run(scenario, compiled=True) == eager


WRONG = {
    "wider": {"hidden_size": 256},
    "deeper": {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6},
    "shallower": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
}


@pytest.mark.parametrize("how", WRONG)
def test_an_adapter_for_another_model_is_refused_and_the_model_is_as_before(how, adapters, tmp_path):
    wrong = lora(tmp_path / how, 3, **WRONG[how])

    async def scenario(model):
        plain = said(await model.ask(QUESTION, GREEDY))
        with pytest.raises(ModelError, match="does not go with tiny-r1"):
            await model.load_adapter(wrong)
        assert model.adapter is None
        assert said(await model.ask(QUESTION, GREEDY)) == plain
        name = await model.load_adapter(adapters["model"])
        with_adapter = await model.ask(QUESTION, GREEDY)
        with pytest.raises(ModelError, match="does not go with tiny-r1"):
            await model.load_adapter(wrong)
        assert model.adapter == name
        again = await model.ask(QUESTION, GREEDY)
        assert said(again) == said(with_adapter) != plain
        with pytest.raises(UnknownName, match="load_adapter"):
            await model.use_adapter(how)
        await model.use_adapter(None)
        assert said(await model.ask(QUESTION, GREEDY)) == plain

    run(scenario)


def test_an_adapter_of_other_weights_of_the_same_shape_is_refused_and_a_copy_of_its_own_is_not(adapters, tmp_path):
    on_merged = tmp_path / "later"
    shutil.copytree(adapters["model"], on_merged)
    config = json.loads((on_merged / "adapter_config.json").read_text())
    merged = adapters["model"].parent / "model-merged"
    (on_merged / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(merged)}))
    copy_of_base = shutil.copytree(data_dir() / "tiny-r1", tmp_path / "copy")

    async def scenario(model):
        with pytest.raises(ModelError, match=r"was trained on .*model-merged, not on tiny-r1"):
            await model.load_adapter(on_merged)
        assert model.adapter is None

    run(scenario)

    async def own(model):
        assert await model.load_adapter(adapters["model"]) == "model"

    run(own, str(copy_of_base))


def test_a_model_does_not_open_with_a_wrong_adapter(tmp_path):
    wrong = lora(tmp_path / "wider", 3, hidden_size=256)
    with pytest.raises(ModelError, match="does not go with"):
        run(lambda model: model.ask(QUESTION, GREEDY), adapters={"a": wrong})


def test_adapters_that_are_pickles_or_nothing_are_refused(adapters, tmp_path):
    pickled, bare = tmp_path / "pickled", tmp_path / "bare"
    shutil.copytree(adapters["model"], pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    bare.mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(adapters["model"], broken)
    (broken / "adapter_config.json").write_text("{")
    cut = tmp_path / "cut"
    shutil.copytree(adapters["model"], cut)
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])

    async def scenario(model):
        plain = said(await model.ask(QUESTION, GREEDY))
        for folder, told in (
            (pickled, "pickle"),
            (bare, "adapter_config"),
            (tmp_path / "none", "adapter_config"),
            (broken, "cannot be read"),
            (cut, "does not go with"),
        ):
            with pytest.raises(ModelError, match=told):
                await model.load_adapter(folder)
            assert said(await model.ask(QUESTION, GREEDY)) == plain

    run(scenario)


def test_loading_adapters_says_nothing_on_stderr(adapters, capfd):
    async def scenario(model):
        capfd.readouterr()
        for folder in adapters.values():
            await model.load_adapter(folder)
        return capfd.readouterr().err

    assert run(scenario) == ""


def test_names_are_unique_and_unknown_ones_are_told_with_those_that_are_there(adapters):
    async def scenario(model):
        await model.load_adapter(adapters["model"], "sums")
        with pytest.raises(ModelError, match="another name"):
            await model.load_adapter(adapters["first.v1"], "sums")
        with pytest.raises(UnknownName, match="did you mean 'sums'"):
            await model.use_adapter("sum")
        return model.adapter

    assert run(scenario) == "sums"
