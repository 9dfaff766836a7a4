"""Mutations that turn good files into broken and hostile ones: bytes, JSON, YAML, and safetensors.

Every function takes a `random.Random`, which alone determines its result.
"""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

NUMBERS = [0, -1, 1, 2, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63)]
REALS = [0.5, -0.5, 1e308, -1e308, 1e301, 5e-324, 1e39, 1.5e9, float("nan"), float("inf"), float("-inf")]
TEXTS = ["", "x", "\0", "\ud800", "\u202e", "q0.8", "1e5", "true", "../../..", "%s{}", "é" * 40, "y" * 100_000, "\n\n"]
VALUES = [*NUMBERS, *REALS, *TEXTS, 10**400, None, True, False, [], {}, [[]], [None], [0, 0], {"": 0}, {"id": []}]
DEEP = "@@DEEP@@"  # replaced by deeply nested JSON after the tree was written


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Return the content after one to four changes: flips, cuts, insertions, blocks that are doubled or swapped."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not data:
            break
        first, second = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        size = min(rng.choice([1, 2, 4, 8, 64]), second - first + 1)
        kind = rng.choice(["flip", "byte", "number", "cut", "drop", "insert", "double", "swap"])
        if kind == "flip":
            data[first - 1] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            data[first - 1] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif kind == "number":
            value = rng.choice(NUMBERS) % 2**64
            data[first : first + size] = value.to_bytes(8, rng.choice(["little", "big"]))[:size]
        elif kind == "cut":
            del data[second:]
        elif kind == "drop":
            del data[first : first + size]
        elif kind == "insert":
            data[first:first] = rng.choice([rng.randbytes(size), bytes(size), b"\xff" * size])
        elif kind == "double":
            data[first:first] = data[first : first + size]
        else:
            data[first : first + size], data[second : second + size] = (
                data[second : second + size],
                data[first : first + size],
            )
    return bytes(data)


def _holders(tree: Any) -> list[Any]:
    """Return every dictionary and list of a tree that has an entry."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (dict, list)) and node:
            found.append(node)
            waiting += node.values() if isinstance(node, dict) else node
    return found


def mutated_tree(rng: random.Random, tree: Any, values: list = VALUES) -> Any:
    """Return a tree of dictionaries and lists with one to three entries deleted, doubled, moved or replaced."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        holders = _holders(tree)
        if not holders:
            break
        holder = rng.choice(holders)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        kind = rng.choice(["delete", "value", "value", "value", "copy", "retarget", "deep"])
        if kind == "delete":
            del holder[key]
        elif kind == "value":
            holder[key] = copy.deepcopy(rng.choice(values))
        elif kind == "deep":
            holder[key] = DEEP
        elif kind == "copy":
            holder[key] = copy.deepcopy(rng.choice(holders))
        elif isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        else:
            holder[rng.choice([*holder, *TEXTS])] = holder.pop(key)
    return tree


def mutated_json(rng: random.Random, tree: Any) -> bytes:
    """Return a JSON file: a mutated tree, or the bytes of the good one mutated, or one with a key twice."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, json.dumps(tree, indent=1).encode())
    text = json.dumps(mutated_tree(rng, tree), ensure_ascii=rng.random() < 0.8)
    if rng.random() < 0.1:
        key, value = (
            rng.choice(["id", "rocks", "version", "count", "log", "arms"]),
            rng.choice(["3", "[]", "null", "{}"]),
        )
        place = rng.choice([place for place, sign in enumerate(text) if sign == "{"])
        text = f'{text[: place + 1]}"{key}": {value}, {text[place + 1 :]}'
    depth = rng.choice([10, 500, 100_000])
    deep = rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth])
    return text.replace(f'"{DEEP}"', deep).encode("utf-8", "surrogatepass")


def yaml_attacks(marker: str) -> list[str]:
    """Return YAML that an unsafe loader would run as code, that expands without end, or that breaks a constructor."""
    command = f"touch {marker}"
    tags = [
        f"!!python/object/apply:os.system ['{command}']",
        f"!!python/object/apply:subprocess.check_output [[touch, {marker}]]",
        f"!!python/object/new:os.system ['{command}']",
        f'!!python/object/apply:builtins.exec ["open({marker!r}, {"w"!r})"]',
        "!!python/name:os.system",
        "!!python/module:antigravity",
        "!!python/tuple [1, 2]",
        "!!timestamp later",
        "!!timestamp 2026-99-99",
        "2026-13-45",
        "!!int ''",
        "!!int x",
        "!!float ''",
        "!!float x",
        "!!bool perhaps",
        "!!binary '@'",
        "!!binary aGVsbG8=",
        "!!set {1, 2}",
        "!!omap [1]",
        "!!pairs x",
        "!!null x",
        "!!map [1]",
        "!!seq {a: 1}",
        "!!str {a: 1}",
        "!unknown 1",
        "! 1",
        ":".join("59" for _ in range(20_000)),
        "9" * 20_000,
        "0x" + "f" * 20_000,
        "1" * 4000 + ".5",
        "{? [1, 2] : 3}",
        "{? {} : 3}",
        "{1: 2}",
        "&a [*a]",
        "&a {b: *a}",
        "*nowhere",
        "&a &b 1",
        "[" * 20_000,
        "{a: " * 20_000,
        "- " * 5000,
        "'" + "x" * 200_000 + "'",
        "|\n  a\n  b",
        "&x",
        "{<<: 1}",
        "{<<: [1]}",
        "{<<: {a: 1}}",
        "{=: 1}",
    ]
    bomb = ["b0: &b0 [" + ", ".join("x" * 10 for _ in range(9)) + "]"]
    bomb += [f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 10)]
    merge = ["m0: &m0 {" + ", ".join(f"k{n}: {n}" for n in range(9)) + "}"]
    merge += [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 10)]
    whole = ["\n".join(bomb) + "\nVALUE: *b9", "\n".join(merge) + "\nVALUE: {<<: *m9}"]
    whole += ["VALUE: 1\nVALUE: 2", "VALUE: 1\n--- \nVALUE: 2", "%YAML 9.9\n---\nVALUE: 1", "\tVALUE: 1", "VALUE"]
    whole += ["- VALUE", "? VALUE", "<<: {VALUE: 1}", "1: 2", "null: 1", "true: 1", "[1, 2]: 3", "2026-01-01: 1", ""]
    return [f"VALUE: {tag}" for tag in tags] + whole


def mutated_yaml(rng: random.Random, tree: dict[str, Any], marker: str) -> bytes:
    """Return a recipe with mutated bytes or a mutated tree, or with an attack in place of a value."""
    import yaml

    kind = rng.choice(["bytes", "tree", "attack", "value"])
    if kind == "bytes":
        return mutated_bytes(rng, yaml.safe_dump(tree, sort_keys=False).encode())
    if kind == "attack":
        tree = dict(rng.sample(list(tree.items()), rng.randrange(len(tree))))
        name = rng.choice([*tree, "env", "report_to", "model_init_kwargs", "lora_target_modules", "config", "nothing"])
        tree.pop(name, None)
        text = (yaml.safe_dump(tree) if tree else "") + rng.choice(yaml_attacks(marker)).replace("VALUE", name)
        return text.encode(rng.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig"]), "surrogatepass")
    if kind == "value":
        tree = tree | {rng.choice(list(tree)): copy.deepcopy(rng.choice(VALUES))}
    else:
        tree = mutated_tree(rng, tree)
        tree |= rng.choice([{}, {}, {"env": rng.choice(VALUES)}, {"env": {"A": rng.choice(VALUES)}}, {7: 1}])
    dump: Callable[..., str] = yaml.safe_dump
    return dump(tree, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")


# safetensors: 8 bytes of length, a JSON header of that length, the tensors


def mutated_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Return a safetensors file with damaged bytes, or with another header of the right length, or other numbers."""
    size = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + size], content[8 + size :]
    kind = rng.choice(["bytes", "header", "header", "metadata", "numbers", "numbers"])
    if kind == "bytes":
        return mutated_bytes(rng, content)
    if kind == "numbers":
        body = bytearray(body)
        for _ in range(rng.choice([1, 2, 8])):
            place = 8 * rng.randrange(len(body) // 8)
            body[place : place + 8] = rng.choice(
                [rng.randbytes(8), (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")]
            )
        return content[: 8 + size] + bytes(body)
    tree = json.loads(header)
    if kind == "header":
        header = mutated_json(rng, tree)
    else:
        about = tree["__metadata__"]
        about["measure"] = mutated_json(rng, json.loads(about["measure"])).decode("utf-8", "replace")
        header = json.dumps(tree).encode()
    return len(header).to_bytes(8, "little") + header + body
