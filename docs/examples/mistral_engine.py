"""mistral.rs for prill: `--engine 'py:docs/examples/mistral_engine.py:MistralRs,arithmetic=half'`.

Its chat call alone tells logprobs. It takes texts, so ids go in as the text that they stand for, and a
template of the messages alone lets it through; what comes out is told by id, with the likeliest beside it.

    python docs/examples/mistral_engine.py fixture:llama-tiny:f16

says how far the logprobs that it tells of its own ids are from the oracle's.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from mistralrs import ChatCompletionRequest, Runner, Which

from prill_harness import open_engine

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TOP = 20
TEXTS, TOKENS = ("The cat sat", "The Book of Redfern"), 6
ENDS = {"length": "length", "stop": "eos", "eos": "eos"}


class MistralRs:
    name = "mistralrs"
    version = version("mistralrs")
    draws = "own"

    def __init__(self, model):
        file = Path(model)
        with tempfile.TemporaryDirectory() as folder:
            template = Path(folder, "text.jinja")
            template.write_text(TEMPLATE)
            which = Which.GGUF(quantized_model_id=str(file.parent), quantized_filename=file.name)
            self.runner = Runner(which, chat_template=str(template), prefix_cache_n=0)

    def tokenize(self, text, add_special=True):
        return self.runner.tokenize_text(text, add_special, None)

    def detokenize(self, ids):
        return self.runner.detokenize_text(list(ids), True)

    def generate(self, ids, max_tokens, stop=(), ignore_eos=False):
        text = self.detokenize(ids)
        if self.tokenize(text) != list(ids):
            raise NotImplementedError("ids that are not those of their text cannot be asked about")
        request = ChatCompletionRequest(
            messages=[{"role": "user", "content": text}], model="default", max_tokens=max_tokens, top_k=1,
            temperature=1.0, logprobs=True, top_logprobs=TOP,
            stop_seqs=list(stop) or None, ignore_eos=ignore_eos,
        )  # fmt: skip
        choice = self.runner.send_chat_completion_request(request).choices[0]
        told = choice.logprobs.content or []
        top = [{each.token: each.logprob for each in one.top_logprobs} for one in told]
        stopped = bool(stop) and choice.finish_reason == "stop"
        return {
            "ids": [max(row, key=row.get) for row in top],
            "logprobs": [one.logprob for one in told],
            "top": [list(row.items()) for row in top],
            "text": choice.message.content or "",
            "finish_reason": "stop" if stopped else ENDS[choice.finish_reason],
        }


def furthest(model):
    """How many logprobs it told behind TEXTS, and the largest difference of one from the oracle's."""
    apart = []
    spec = f"py:{__file__}:MistralRs,arithmetic=half"
    with open_engine(spec, model) as engine, open_engine("numpy64", model) as oracle:
        for text in TEXTS:
            ids = engine.tokenize(text)
            made = engine.generate(ids, max_tokens=TOKENS)
            rows = oracle.logits([*ids, *made.ids])[len(ids) - 1 :]
            for row, told in zip(rows, made.top, strict=False):
                right = row - row.max() - np.log(np.exp(row - row.max()).sum())
                apart += [abs(right[token] - logprob) for token, logprob in told.items()]
    return len(apart), max(apart)


if __name__ == "__main__":
    print("{} logprobs told, at most {:.1e} from the oracle's".format(*furthest(sys.argv[1])))
