"""What runtimes say of a network that they cannot run, in plain words: the cause first, without their C++."""

import re

LONGEST = 240
RULES = (
    (
        r"Unsupported model IR version: (\d+), max supported IR version: (\d+)",
        r"its IR version is \1 and onnxruntime reads up to \2: save it with an older one, or update onnxruntime",
    ),
    (
        r"Opset (\d+) is under development.*?domain (\S+) is till opset (\d+)",
        r"its opset of \2 is \1 and onnxruntime knows up to \3: export it with that, or update onnxruntime",
    ),
    (
        r'In Node, \("[^"]*", (\w+), "([^"]*)".*(?:No opset import for domain|is not a registered function/op)',
        r"onnxruntime has no operator \2.\1",
    ),
    (r"Fatal error: (\S*?):?(\w+)\(-?\d+\) is not a registered function/op", r"onnxruntime has no operator \1.\2"),
    (r"No conversion rule found for operations: ([\w., ]+)", r"openvino has no operator \1"),
    (
        r"running (\w+) node\. Name:'([^']*)' Status Message: (?:\S+ [=!<>]= \S+ was false\. )?(.*)",
        r"its \1 node \2 does not run: \3",
    ),
    (r"Op registered for (\w+) is deprecated in domain_version of (\d+)", r"opset \2 has no operator \1 any more"),
    (r"Node input '([^']*)' is not a graph input", r"a node reads \1, which is nowhere in the file"),
    (r'Input tensor isn\'t found for node "([^"]*)"', r"a node reads \1, which is nowhere in the file"),
    (r"Node \(([^)]*)\) Op \((\w+)\) \[ShapeInferenceError\] (.*)", r"its \2 node \1 does not fit what comes in: \3"),
    (
        r"While validating ONNX node '<Node\((\w+)\): ([^>]*)>'",
        r"its \1 node \2 does not fit what comes in: sizes inside the file may not be those of its input",
    ),
)
PLACES = re.compile(r"Exception from \S+:\d+:\s*|Check '[^']*' failed at \S+:\d+:\s*")
KIND = re.compile(r"^(?:Fail|InvalidGraph|InvalidArgument|RuntimeException|NotImplemented|RuntimeError): ")


def plain(reason: str) -> str:
    """A reason in one line; as it is, but for its length, where nothing is known about it."""
    for pattern, words in RULES:
        if found := re.search(pattern, reason):
            reason = found.expand(words).replace("no operator .", "no operator ").replace("node  ", "node ")
            break
    reason = " ".join(PLACES.sub("", KIND.sub("", reason)).split())
    return reason if len(reason) <= LONGEST else f"{reason[:LONGEST].rsplit(' ', 1)[0]} ..."
