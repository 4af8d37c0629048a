"""A server of completions around an engine of prill's: llama.cpp's API or OpenAI's, and defects by name.

    python served.py MODEL PORT CONTEXT DIALECT [ENGINE]

PORT 0 chooses one; it is printed. A POST to /defect switches to the defects in its body, separated by spaces.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from prill_harness.engines.base import Engine
from prill_harness.faults.opening import open_engine
from prill_harness.numbers.compare import log_softmax

WRONG_AT = 5  # the token that the defect "token" gets wrong
ENDS_AT = 3  # the token in whose place the defect "ends" ends the text
SLOTS = 4  # requests at one time; another waits


class Answers:
    """What the engine writes, one token after another, with the defects that are switched on."""

    def __init__(self, engine: Engine, context: int) -> None:
        self.engine, self.model, self.context = engine, engine.model, context  # type: ignore[attr-defined]
        self.tokenizer = self.model.tokenizer
        self.defects: set[str] = set()
        self.asked: list[str] = []
        self.over = threading.Event()
        self.slots = threading.Semaphore(SLOTS)
        self.count, self.refused, self.latest = 0, False, [0]

    def has(self, defect: str) -> bool:
        return defect in self.defects

    def prompt(self, ids: list[int]) -> list[int]:
        """What becomes of a prompt."""
        self.count += 1
        before, self.latest = self.latest, ids
        if self.has("cut_off"):
            ids = ids[-(self.context - 8) :]
        if self.has("wraps"):
            ids = [each % self.model.vocab_size for each in ids]
        if (self.has("warm_short") and self.count % 2) or (self.has("error_stays") and self.refused):
            ids = ids[1:]
        if self.has("late_lost") and len(ids) > 50:
            ids = [*ids[:48], *ids[49:]]
        if self.has("mixed") and self.slots._value < SLOTS - 1:
            ids = before
        return [self.tokenizer.bos_id or ids[0], *ids] if self.has("bos_twice") else ids

    def write(
        self, ids: list[int], count: int, told: int, stop: list[str], ignore_eos: bool,
        temperature: float = 0.0, seed: int = 0,
    ) -> Any:  # fmt: skip
        """(id, logprob, top, reason, text) of each token; the reason ends it."""
        shown = Shown(stop, self.has("split"), self.has("stop_left"))
        session, text = self.engine.session(), b""
        feed, seed = self.prompt(list(ids)), self.count if self.has("seed_drawn") else seed
        stop, late = [] if self.has("stop_ignored") else stop, 0.0
        count += self.has("one_more") or (self.has("one_for_none") and not count)
        for at in range(count):
            row = session.feed(feed)[-1].astype(np.float64)
            order = np.argsort(-row, kind="stable")
            token = int(order[1] if self.has("token") and at == WRONG_AT else order[0])
            if temperature:
                draw = np.random.default_rng([0 if self.has("seed_ignored") else seed, len(ids) + at])
                token = int(np.argmax(row / temperature + draw.gumbel(size=len(row))))
            flat = 2.0 if self.has("warm") else temperature if self.has("tempered") and temperature else 1.0
            logprobs = log_softmax(row / flat)
            logprobs = logprobs / np.log(10) if self.has("log10") else logprobs
            logprobs = logprobs + 0.5 if self.has("sum") else logprobs
            best = [int(each) for each in order[:told]]
            best = best[1:] if self.has("first_missing") else best
            top = [(each, float(logprobs[each])) for each in best]
            if self.has("ids_shifted"):
                top = [(each, value) for (each, _), (_, value) in zip(top, [*top[1:], top[0]], strict=True)]
            if self.has("ends") and at == ENDS_AT:
                token = self.tokenizer.eos_id or 0
            end = token in self.tokenizer.eog_ids and not ignore_eos and not self.has("past_end")
            text += self.tokenizer.piece(token)
            feed = [token]
            reason = "eos" if end else ""
            if any(each.encode() in text for each in stop):
                reason = "stop"
            elif not end and len(ids) + at + 1 > self.context:
                reason = "context"
            elif at + 1 == count or (self.has("short") and at + 2 == count):
                reason = "length"
            own, late = late if self.has("late_logprobs") else float(logprobs[token]), float(logprobs[token])
            top = [] if self.has("late_logprobs") else top
            yield token, own, top, reason, shown.more(b"" if end else self.tokenizer.piece(token), reason)
            if reason:
                return


class Shown:
    """As much of a text as can be told: whole characters, and nothing that may begin a stop string."""

    def __init__(self, stop: list[str], split: bool, left: bool) -> None:
        self._stop, self._split, self._left, self._held = stop, split, left, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def more(self, piece: bytes, reason: str) -> str:
        """What a token adds; `reason` ends the text."""
        if self._split:
            return piece.decode("utf-8", "replace")
        self._held += self._decoder.decode(piece, bool(reason))
        begun = [n for each in self._stop for n in range(1, len(each)) if self._held.endswith(each[:n])]
        kept = len(self._held) - (0 if reason else max(begun, default=0))
        if reason == "stop" and not self._left:
            kept = min(at for each in self._stop if (at := self._held.find(each)) >= 0)
        told, self._held = self._held[:kept], self._held[kept:]
        return told


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answers: Answers
    llama: bool

    def log_message(self, *_: object) -> None:
        """Write nothing."""

    def do_GET(self) -> None:
        a = self.answers
        a.asked.append(self.path)
        if a.has("moved"):
            return self._send(302, {}, Location="http://localhost:1/")
        if a.has("loading") and a.asked.count("/health") < 3:
            return self._send(503, {"error": {"message": "Loading model"}})
        meta = {"n_vocab": a.model.vocab_size + a.has("config")}
        models = [{"id": "tiny", "owned_by": "test", "meta": meta, "max_model_len": a.context}]
        if a.has("two"):
            models.append({"id": "other", "owned_by": "test"})
        told = {
            "/health": {"status": "ok"}, "/v1/models": {"data": models}, "/asked": a.asked,
            "/version": {"version": "1.5"},
        }  # fmt: skip
        if self.llama:
            told["/props"] = {"default_generation_settings": {"n_ctx": a.context}, "build_info": "b7"}
        if a.has("odd_models") and self.path == "/v1/models":
            return self._send(200, [1])
        if self.path in told:
            return self._send(200, told[self.path])
        return self._send(404, {"error": {"message": "File Not Found", "type": "not_found_error"}})

    def do_POST(self) -> None:
        a = self.answers
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/defect":
            a.defects, a.asked[:], a.refused, a.count = set(body.split()), [], False, 0
            return self._send(200, {})
        if self.path == "/release":
            a.slots.release()
            return self._send(200, {})
        a.asked.append(self.path)
        wanted = next((each for each in a.defects if each.startswith("bearer=")), "")
        if wanted and self.headers.get("Authorization") != wanted.replace("bearer=", "Bearer "):
            return self._send(401, {"error": {"message": f"wrong token {self.headers.get('Authorization')}"}})
        if self.path == "/tokenize" and not a.has("no_tokenize"):
            text = body["content" if self.llama else "prompt"]
            special = body["add_special" if self.llama else "add_special_tokens"]
            text = text.replace("\r\n", "\n") if a.has("crlf") else text
            return self._send(200, {"tokens": a.engine.tokenize(text, special or a.has("always_special"))})
        if self.path == "/detokenize":
            encoding = "ascii" if a.has("ascii") else "utf-8"
            text = a.engine.detokenize(body["tokens"]).decode(encoding, "replace")
            return self._send(200, {"content" if self.llama else "prompt": text})
        if self.path != ("/completion" if self.llama else "/v1/completions"):
            return self._send(404, {"detail": "Not Found"})
        return self._completion(body)

    def _completion(self, body: dict[str, Any]) -> None:
        a, prompt = self.answers, body["prompt"]
        if a.has("broken"):
            return self._send(
                500, {"error": {"message": f"out of memory, {self.headers.get('Authorization')}"}}
            )
        if a.has("silent"):
            a.over.wait()
            return None
        if a.has("dies"):
            print("last words", flush=True)
            os._exit(7)
        if a.has("garbage"):
            return self._send(200, b"<html>")
        if a.has("flood"):
            return self._send(200, b"x" * 100_000)
        extra = {"ignore_eos", "top_k", "return_token_ids"} & body.keys()
        if a.has("plain") and (extra or not isinstance(prompt, str) or body.get("logprobs", 0) > 0):
            return self._send(422, {"detail": "extra fields not permitted"})
        if lacking := [key for key in ("stop", "stream") if a.has(f"no_{key}") and body.get(key)]:
            return self._send(400, {"error": {"message": f"{lacking[0]} is not supported"}})
        if a.has("five") and body.get("logprobs", 0) > 5:
            return self._send(400, {"error": {"message": "logprobs: at most 5"}})
        ids = a.engine.tokenize(prompt) if isinstance(prompt, str) else prompt
        refused = {}
        if not a.has("wraps") and not all(0 <= each < a.model.vocab_size for each in ids):
            refused = {"message": "Prompt contains invalid tokens"}
        elif not a.has("cut_off") and len(ids) >= a.context:
            refused = {"message": f"maximum context length is {a.context}", "type": "BadRequestError"}
        if refused:
            a.refused = True
            return self._send(400, {"error": refused})
        if not a.slots.acquire(timeout=0.2 if a.has("slot_kept") else 60):
            return self._send(503, {"error": {"message": "no slot is free"}})
        self.hung_up = False
        try:
            return self._answer(body, ids)
        finally:
            if not (self.hung_up and a.has("slot_kept")):
                a.slots.release()

    def _answer(self, body: dict[str, Any], ids: list[int]) -> None:
        a = self.answers
        count = body["n_predict" if self.llama else "max_tokens"]
        told = body["n_probs"] if self.llama else body.get("logprobs", 0)
        drawn = body.get("temperature", 0.0), body.get("seed", 0)
        found = a.write(ids, count, told, body.get("stop", []), body.get("ignore_eos", False), *drawn)
        messages = self._llama(found) if self.llama else self._openai(found, told)
        if body.get("stream"):
            return self._stream(messages)
        return self._send(200, merged(list(messages)))

    def _llama(self, found: Any) -> Any:
        a, count, ended = self.answers, 0, "length"
        for token, logprob, top, reason, piece in found:
            count, ended = count + 1, reason
            entry = {
                "id": token, "logprob": logprob,
                "top_logprobs": [{"id": each, "logprob": value} for each, value in top],
            }  # fmt: skip
            if a.has("entry_of_another"):
                entry["id"] = token + 1
            missing = a.has("some_entries") and count % 3 == 0
            yield {
                "content": piece, "tokens": [str(token) if a.has("id_text") else token], "stop": False,
                "completion_probabilities": [] if missing else [entry],
            }  # fmt: skip
        kinds = {"eos": "eos", "stop": "word"}
        yield {
            "content": "", "tokens": [], "stop": True, "stop_type": kinds.get(ended, "limit"),
            "truncated": ended == "context", "tokens_predicted": count + a.has("hidden"),
        }  # fmt: skip

    def _openai(self, found: Any, told: int) -> Any:
        a = self.answers
        nothing = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        more = {"logprobs": nothing, "token_ids": []} if told and not a.has("plain") else {}
        reason = None
        for token, logprob, top, reason, piece in found:
            choice: dict[str, Any] = {"text": "?" if a.has("text") else piece, "finish_reason": None}
            if told and not a.has("plain"):
                choice["logprobs"] = {
                    "tokens": [f"token_id:{token}"], "token_logprobs": [logprob],
                    "top_logprobs": [{f"token_id:{each}": value for each, value in top}],
                }  # fmt: skip
                choice["token_ids"] = [token]
            if reason:
                choice["finish_reason"] = "stop" if reason in ("eos", "stop") else "length"
                choice["stop_reason"] = "\n" if reason == "stop" else None
            yield {"choices": [choice]}
        if reason is None:
            yield {"choices": [{"text": "", "finish_reason": "length", **more}]}

    def _stream(self, messages: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for number, message in enumerate(messages):
            if self.answers.has("cut") and number == 2:
                break
            if self.answers.has("error_event") and number == 2:
                message = {"error": {"message": "lost the device"}}
            try:
                while self.answers.has("pings") and number == 2 and not self.answers.over.wait(0.02):
                    self.wfile.write(b": ping\n\n")
                self.wfile.write(b"data: " + json.dumps(message).encode() + b"\n\n")
                self.wfile.flush()
            except OSError:
                self.hung_up = True
                self.answers.asked.append("cancelled")
                break
        else:
            self.wfile.write(b"" if self.llama else b"data: [DONE]\n\n")
            self.wfile.flush()
        self.close_connection = True

    def _send(self, status: int, said: Any, **headers: str) -> None:
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        cut = self.answers.has("cut") and self.command == "POST"
        self.send_header("Content-Length", str(len(data) + (9 if cut else 0)))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = cut


def merged(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer of what a stream says."""
    if "choices" not in messages[0]:
        texts = "".join(each["content"] for each in messages)
        lists = {
            name: [one for each in messages for one in each.get(name, [])]
            for name in ("tokens", "completion_probabilities")
        }
        return {**messages[-1], "content": texts, **lists}
    choices = [each["choices"][0] for each in messages]
    whole = {**choices[-1], "text": "".join(each["text"] for each in choices)}
    if "token_ids" in whole:
        whole["token_ids"] = [one for each in choices for one in each["token_ids"]]
        told = [each["logprobs"] for each in choices]
        whole["logprobs"] = {name: [one for each in told for one in each[name]] for name in told[0]}
    return {"choices": [whole]}


class Server(ThreadingHTTPServer):
    """Says nothing of a client that is gone: that is no error of the server's, and its log is compared."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def main(model: str, port: str, context: str, dialect: str, engine: str = "numpy") -> None:
    if dialect == "dead":
        print("no such device\ngiving up", flush=True)
        sys.exit(3)
    answers = Answers(open_engine(engine, model), int(context))
    handler = type("Own", (Handler,), {"answers": answers, "llama": dialect == "llama"})
    with Server(("127.0.0.1", int(port)), handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
