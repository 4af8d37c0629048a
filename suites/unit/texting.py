"""An engine with a command line that takes a prompt and writes a text: `MODEL PROMPT TOKENS [WORD]...`.

Words: `fault:NAME`, planted in the engine; `banner`, two lines before the text; `echo`, the prompt before it;
`die`, `hang`, `flood`; `stdin`, the prompt comes from there.
"""

from __future__ import annotations

import sys
import time

from prill_harness.engines.textstream import IncrementalDetokenizer
from prill_harness.faults.opening import open_engine

if __name__ == "__main__":
    model, prompt, tokens, *words = sys.argv[1:]
    if "die" in words:
        sys.exit("there is no such model")
    if "hang" in words:
        print("begun", flush=True)
        time.sleep(600)
    while "flood" in words:
        sys.stdout.write("x" * 65536)
    if "stdin" in words:
        prompt = sys.stdin.read()
    if "banner" in words:
        print("an engine of the tests'\nready")
    planted = [f"+{word}" for word in words if word.startswith("fault:")]
    with open_engine(f"numpy{''.join(planted)}", model) as engine:
        ids = engine.tokenize(prompt)
        stream = IncrementalDetokenizer(engine.detokenize, ids)
        text = "".join(map(stream.push, engine.generate(ids, max_tokens=int(tokens)).ids)) + stream.finish()
    print((prompt if "echo" in words else "") + text)
