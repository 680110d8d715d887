"""Several threads ask one bundle at once: every answer is the one that it gives to a single thread."""

import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import transformers

import mergetool
from mergetool.bundle.local import make_local, pending, replaced
from mergetool.testing.classifiers import save_experts, text_inputs, tiny_config
from tests.bundle.tiny import OPTIONS, ROUTER, make_bundle, tiny_inputs
from tests.files import LONG

NUM_THREADS = 8 if LONG else 4
NUM_BATCHES = 6 if LONG else 4
FAMILIES = ["bert", "vit", "llama", "t5", "gpt2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: make_bundle(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def batches(family, count=NUM_BATCHES):
    """Batches of several lengths, all different."""
    torch.manual_seed(2)
    found = []
    for number in range(count):
        inputs = tiny_inputs(family, 5 - number % 5)
        if family == "vit":
            found.append({"pixel_values": torch.randn_like(inputs["pixel_values"])})
        else:
            found.append(inputs | {"input_ids": torch.randint(1, 40, inputs["input_ids"].shape)})
    return found


def at_once(call, items):
    """`call` of every item by many threads, several times over."""
    start = threading.Barrier(NUM_THREADS)

    def work(offset):
        start.wait()
        order = [(place + offset) % len(items) for place in range(len(items))]
        return [(place, call(items[place])) for place in order]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [pair for found in pool.map(work, range(NUM_THREADS)) for pair in found]


def same(found, expected):
    assert found.tasks == expected.tasks
    assert found.task == expected.task
    torch.testing.assert_close(found.coefficients, expected.coefficients, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "cache_bytes"),
    [(family, size) for family in FAMILIES for size in (1, 1 << 30) if LONG or size == 1 or family in ("bert", "t5")],
)
def test_many_threads_get_the_answers_that_one_gets(family, cache_bytes, folders):
    asked = batches(family)
    model = mergetool.load_bundle(folders[family], cache_bytes=cache_bytes)
    expected = [model(**inputs) for inputs in asked]
    assert len({tasks for answer in expected for tasks in answer.tasks}) > 1
    for place, answer in at_once(lambda inputs: model(**inputs), asked):
        same(answer, expected[place])
    assert not any("forward" in vars(module) for module in model.base.modules())


def test_threads_that_route_see_neither_each_other_nor_a_second_pass(tmp_path):
    router = replace(ROUTER, layers=("*query*",), features="merged", redundancy=1.0)
    model = mergetool.load_bundle(make_bundle(tmp_path, "bert", options=replace(OPTIONS, router=router)))
    asked = batches("bert")
    expected = [model.route(**inputs) for inputs in asked]
    forced = model(tasks=["b"], **asked[3])

    def ask(inputs):
        same(model(tasks=["b"], **asked[3]), forced)
        return model.route(**inputs)

    for place, routing in at_once(ask, asked):
        assert routing.tasks == expected[place].tasks
        torch.testing.assert_close(routing.distances, expected[place].distances, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["Bert", "GPT2"])
def test_many_threads_get_the_answers_of_classifiers(family, tmp_path):
    kind = getattr(transformers, f"{family}ForSequenceClassification")
    paths = save_experts(tmp_path, kind, tiny_config(kind), getattr(transformers, f"{family}Model"), a=3, b=5)
    models = {task: str(paths[task]) for task in "ab"}
    recipe = {"base": str(paths["base"]), "models": models, "merge": {"method": "mass", "router": {"threshold": 0.45}}}
    model = mergetool.load_bundle(mergetool.run(recipe, output=tmp_path / "out").path)
    asked = [text_inputs(1 + number % 5, seed=number) for number in range(NUM_BATCHES + 1)]
    expected = [model(**inputs) for inputs in asked]
    for place, answer in at_once(lambda inputs: model(**inputs), asked):
        same(answer, expected[place])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_many_threads_generate_what_one_generates(family, folders):
    model = mergetool.load_bundle(folders[family])
    asked = [
        inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])} for inputs in batches(family, NUM_BATCHES - 2)
    ]
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = [model.generate(**inputs, **options) for inputs in asked]
    for place, found in at_once(lambda inputs: model.generate(**inputs, **options), asked):
        assert torch.equal(found, expected[place])


def test_a_small_service_answers_all_its_clients(folders):
    model = mergetool.load_bundle(folders["bert"])
    asked = [each for _ in range(3) for each in batches("bert", 12)][:32]
    expected = [model(**inputs) for inputs in asked]

    class Service(BaseHTTPRequestHandler):
        def do_POST(self):
            row = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = model(**{key: torch.tensor(value) for key, value in row.items()})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"tasks": answer.tasks, "best": answer.logits.argmax(-1).tolist()}).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(inputs):
        body = json.dumps({key: value.tolist() for key, value in inputs.items()}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/", body, timeout=60) as reply:
            return json.loads(reply.read())

    try:
        with ThreadPoolExecutor(NUM_THREADS) as clients:
            replies = list(clients.map(ask, asked))
    finally:
        server.shutdown()
        server.server_close()
    right = [
        [tuple(tasks) for tasks in reply["tasks"]] == list(answer.tasks)
        and reply["best"] == answer.logits.argmax(-1).tolist()
        for reply, answer in zip(replies, expected, strict=True)
    ]
    assert sum(right) == 32


def test_a_thread_sees_its_own_weights_and_others_the_modules():
    module = torch.nn.Linear(2, 2, bias=False)
    make_local(module)
    own, mine, inner = module.weight, torch.ones(2, 2), torch.zeros(2, 2)
    seen = []
    with replaced(module, {"weight": mine}):
        other = threading.Thread(target=lambda: seen.append(module.weight))
        other.start()
        other.join()
        with replaced(module, {"weight": inner}):
            assert module.weight is inner
        assert module.weight is mine
        assert torch.equal(module(torch.ones(1, 2)), torch.full((1, 2), 2.0))
        assert module.state_dict()["weight"].data_ptr() == own.data_ptr()
    assert module.weight is own
    assert seen[0] is own


def test_a_pending_tensor_is_made_when_it_is_computed_with_and_not_before():
    made = []

    def make():
        made.append(1)
        return torch.full((2, 3), 2.0)

    found = pending(torch.zeros(2, 3, dtype=torch.float32), make)
    assert (found.dtype, found.device.type, tuple(found.shape), found.ndim) == (torch.float32, "cpu", (2, 3), 2)
    assert not made
    assert torch.equal(torch.nn.functional.linear(torch.ones(1, 3), found), torch.full((1, 2), 6.0))
    assert torch.equal(found.squeeze(0) + 1, torch.full((2, 3), 3.0))
    assert type(found[0]) is torch.Tensor
