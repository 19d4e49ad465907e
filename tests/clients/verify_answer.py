"""A plain Python client of a midemb server that recomputes whole answers from the bundle's files.

    python tests/clients/verify_answer.py --server 127.0.0.1:50051 --bundle models/default --proto proto

Stubs are generated from `proto/`. Every row is computed again with Jinja2, tokenizers, onnxruntime and numpy, without
code of the server or the exporter, and compared with the answer.
"""

import argparse
import os
import tomllib
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it while it is imported.

import grpc
import jinja2
import numpy as np
import onnxruntime
import tokenizers
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from stubs import generate_stubs

ABSOLUTE, COSINE = 1e-4, 0.99999
FIELDS = ("title", "category", "brand", "price")
LISTS = ("keywords", "attributes")
ACTIONS = ["unspecified", "view", "click", "like", "dislike", "share", "cart", "purchase", "skip"]


class Bundle:
    """The bundle's graphs, run for one item at a time, so that a fault in the server's batching shows."""

    def __init__(self, folder: Path):
        self.manifest = tomllib.loads((folder / "manifest.toml").read_text())
        self.template = jinja2.Environment(autoescape=False).from_string(self.manifest["item_text"]["template"])
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / self.manifest["encoder"]["tokenizer"]))
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.enable_truncation(self.manifest["item_text"]["max_tokens"])
        on_cpu = ["CPUExecutionProvider"]
        self.sessions = {
            name: onnxruntime.InferenceSession(str(folder / self.manifest[name]["file"]), providers=on_cpu)
            for name in ("encoder", "user_tower", "item_tower", "cvr")
        }

    def run(self, graph: str, *inputs: np.ndarray) -> list[np.ndarray]:
        spec = self.manifest[graph]
        return self.sessions[graph].run(spec["outputs"], dict(zip(spec["inputs"], inputs, strict=True)))

    def content(self, text: dict) -> np.ndarray:
        ids = np.array([self.tokenizer.encode(self.template.render(**text)).ids], dtype=np.int64)
        return self.run("encoder", ids, np.ones_like(ids))[0][0]

    def user(self, history: list[dict], actions: list[str]) -> np.ndarray:
        max_history = self.manifest["user_tower"]["max_history"]
        newest = list(zip(history, actions, strict=True))[-max_history:]
        adapted = np.zeros((1, max(len(newest), 1), self.manifest["item_tower"]["adapted_dim"]), dtype=np.float32)
        mask, action = np.zeros(adapted.shape[:2], dtype=np.int64), np.zeros(adapted.shape[:2], dtype=np.int64)
        trained = self.manifest["history"]["actions"]
        for i, (text, done) in enumerate(newest):
            adapted[0, i] = self.run("item_tower", self.content(text)[None])[1][0]
            mask[0, i] = 1
            # Actions that the tower was not trained with read as unspecified.
            action[0, i] = trained.index(done) + 1 if done in trained else 0
        return self.run("user_tower", adapted, mask, *([action] if trained else []))[0][0]

    def item(self, text: dict) -> np.ndarray:
        return self.run("item_tower", self.content(text)[None])[0][0]

    def fuse(self, user: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, float]:
        mid_emb, cvr = self.run("cvr", user[None], item[None], np.zeros(1, dtype=np.int64))
        return mid_emb[0], float(cvr[0])


def array(tensor) -> np.ndarray:
    assert tensor.dtype == 1, f"dtype is {tensor.dtype}, not F32"
    return np.frombuffer(tensor.data, dtype="<f4").reshape(tuple(tensor.shape))


def assert_near(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    found, expected = np.atleast_1d(found).astype(np.float64), np.atleast_1d(expected).astype(np.float64)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    assert np.isfinite(found).all(), f"{what} is not finite"
    difference = np.abs(found - expected).max()
    assert difference <= ABSOLUTE, f"{what} differs by {difference}"
    if found.size > 1:
        cosine = found @ expected / np.sqrt((found @ found) * (expected @ expected))
        assert cosine > COSINE, f"{what} has cosine {cosine}"


def texts(n: int, seed: int) -> list[dict]:
    """`n` items with varied text; a seed always gives the same ones."""
    random = np.random.default_rng(seed)
    words = ["river", "Nacht", "été", "映画", "фильм", "نور", "🎬", 'a "quoted" word', "{{ braces }}", "long " * 80]
    words.append("[SEP] <s> [MASK]")  # Names of special tokens, which are text like any other.
    pick = lambda: str(random.choice(words))  # noqa: E731
    return [
        {
            "title": f"{pick()} {i}",
            "category": pick() if random.random() < 0.7 else "",
            "brand": pick() if random.random() < 0.4 else "",
            "price": f"{i}.99 yuan" if random.random() < 0.3 else "",
            "keywords": [pick() for _ in range(random.integers(0, 4))],
            "attributes": [pick() for _ in range(random.integers(0, 3))],
        }
        for i in range(n)
    ]


def message(pb, text: dict, item_id: str):
    return pb.Item(id=item_id, text=pb.ItemText(**{name: text[name] for name in (*FIELDS, *LISTS)}))


def verify(pb, stub, bundle: Bundle, n_history: int, n_candidates: int) -> None:
    """Send one request and recompute every row of its answer."""
    history, candidates = texts(n_history, seed=n_history), texts(n_candidates, seed=100 + n_history)
    actions = [str(np.random.default_rng(i).choice(ACTIONS)) for i in range(n_history)]
    request = pb.GetMidEmbRequest(
        user_id=f"python-{n_history}",
        history=[message(pb, text, f"h-{n_history}-{i}") for i, text in enumerate(history)],
        candidates=[message(pb, text, f"c-{n_history}-{i}") for i, text in enumerate(candidates)],
        outputs=[pb.OUTPUT_MID_EMB, pb.OUTPUT_CVR, pb.OUTPUT_USER_EMB, pb.OUTPUT_ITEM_EMB],
        dtype=pb.DTYPE_F32,
        history_actions=[pb.Action.Value(f"ACTION_{action.upper()}") for action in actions],
    )
    answer = stub.GetMidEmb(request, timeout=60)
    assert list(answer.statuses) == [pb.ROW_STATUS_OK] * n_candidates, answer.statuses
    assert answer.history_used == min(n_history, bundle.manifest["user_tower"]["max_history"])
    user = bundle.user(history, actions)
    assert_near("user_emb", array(answer.user_emb), user)
    mid_embs, cvrs, items = array(answer.mid_emb), array(answer.cvr), array(answer.item_emb)
    assert mid_embs.shape == (n_candidates, bundle.manifest["cvr"]["dim"])
    for i, text in enumerate(candidates):
        item = bundle.item(text)
        mid_emb, cvr = bundle.fuse(user, item)
        assert_near(f"item_emb {i}", items[i], item)
        assert_near(f"mid_emb {i}", mid_embs[i], mid_emb)
        assert_near(f"cvr {i}", cvrs[i], cvr)


def check_health(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "midemb.v1.MidEmbService"):
        status = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
        assert status == health_pb2.HealthCheckResponse.SERVING, f"{service!r} is {status}"
    try:
        health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=10)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND, error
    else:
        raise AssertionError("the health check answered for a service that does not exist")
    print("health ok")


def check_reflection(channel: grpc.Channel, pb) -> None:
    """The server describes itself exactly as `proto/` does."""
    database = ProtoReflectionDescriptorDatabase(channel)
    services = set(database.get_services())
    assert {"midemb.v1.MidEmbService", "grpc.health.v1.Health"} <= services, services
    described = database.FindFileContainingSymbol("midemb.v1.GetMidEmbRequest")
    ours = pb.GetMidEmbRequest.DESCRIPTOR
    request = next(m for m in described.message_type if m.name == "GetMidEmbRequest")
    assert {(f.name, f.number) for f in request.field} == {(f.name, f.number) for f in ours.fields}
    print("reflection ok")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--proto", type=Path, required=True)
    args = parser.parse_args()
    pb, pb_grpc = generate_stubs(args.proto)
    with grpc.insecure_channel(args.server) as channel:
        check_health(channel)
        check_reflection(channel, pb)
        stub, bundle = pb_grpc.MidEmbServiceStub(channel), Bundle(args.bundle)
        pages = [(0, 5), (1, 1), (7, 12), (bundle.manifest["user_tower"]["max_history"] + 3, 4)]
        for n_history, n_candidates in pages:
            verify(pb, stub, bundle, n_history, n_candidates)
        print(f"answers recomputed: {len(pages)}")


if __name__ == "__main__":
    main()
