"""The couplings to the libraries for data, the Hub, benchmarks, serving and the command line."""

from __future__ import annotations

from nybble.couplings.coupling import AT_START, BY_TESTS, Coupling

OTHERS = (
    # datasets
    Coupling(
        "a data set's fingerprint", "datasets", ("datasets:Dataset#_fingerprint",), ("data/rows/hub.py",),
        "changed rows would be read from the cache", "an AttributeError before any row is read", written=("._fingerprint",),
    ),
    Coupling(
        "rows behind a selection", "datasets", ("datasets:Dataset#_indices", "datasets:Dataset.data"), ("data/sets/prepare.py",),
        "columns would be in the order of the file", "an AttributeError before training",
    ),
    Coupling(
        "rows written one by one", "datasets",
        ("datasets.arrow_writer:ArrowWriter", "datasets.arrow_writer:ArrowWriter.finalize"),
        ("data/sets/cached_rows.py",), "no rows would be cached", "rows are read back before they are used",
        ("schema", "features", "path"),
    ),
    # huggingface_hub
    Coupling(
        "the HTTP client's errors", "huggingface-hub", ("huggingface_hub.errors:HfHubHTTPError",),
        ("data/rows/hub.py", "model/hub_faults.py"),
        "a network fault would end in a traceback", "tests with a stand-in for the Hub", written=("HfHubHTTPError.__bases__[0]",),
    ),
    Coupling(
        "the layout of the Hub's cache", "huggingface-hub", ("huggingface_hub.constants:HF_HUB_CACHE",),
        ("model/base/downloads.py", "model/hub.py"),
        "a digest in a file's name would not be compared; a folder's name would be mistaken for the commit",
        "tests with a stand-in for the Hub", written=('"blobs"', "folder.name"),
    ),
    # benchmarks, serving, templates, the command line, trackers
    Coupling(
        "a benchmark's progress", "lm-eval",
        ("lm_eval.models.huggingface:HFLM._loglikelihood_tokens", "lm_eval.models.huggingface:HFLM._model_call"),
        ("evaluate/harness.py",), "no progress would be shown", BY_TESTS, ("self", "requests"),
    ),
    Coupling(
        "a benchmark's requests", "lm-eval",
        tuple(f"lm_eval.models.huggingface:HFLM.{name}" for name in ("loglikelihood", "loglikelihood_rolling", "generate_until")),
        ("evaluate/harness.py",), "each process would answer all requests", BY_TESTS, ("self", "requests"),
    ),
    Coupling(
        "the index of tasks", "lm-eval", ("lm_eval.tasks:TaskManager.task_index", "lm_eval.tasks:TaskManager.all_tasks"),
        ("evaluate/harness.py",), "no benchmarks on local files", "an AttributeError before a model is loaded",
    ),
    Coupling(
        "signals of a server", "uvicorn",
        tuple(f"uvicorn:Server{name}" for name in ("#_captured_signals", "#force_exit", ".handle_exit", ".shutdown")),
        ("serve/server.py",), "Ctrl-C would cut answers off, or not end the process", AT_START,
    ),
    Coupling(
        "one connection of a server", "uvicorn",
        tuple(f"uvicorn.protocols.http.h11_impl:H11Protocol{name}" for name in (
            "._unsupported_upgrade_warning", ".send_400_response", ".on_response_complete", ".data_received",
            "#conn", "#cycle", "#limit_concurrency", "#connections",
        )),
        ("serve/connection.py",), "connections would have no deadlines and no limit", AT_START,
    ),
    Coupling(
        "the event loop of a connection", "uvicorn", ("uvicorn.protocols.http.h11_impl:H11Protocol",),
        ("serve/connection.py",), "no connection would be accepted", AT_START, ("config", "server_state", "app_state", "_loop"),
        written=("_loop",),
    ),
    Coupling(
        "h11's messages about malformed requests", "h11", ("h11:RemoteProtocolError", "h11:Connection.next_event"),
        ("serve/connection.py",), "error messages would show bytearray(...)", "a test sends malformed HTTP",
    ),
    Coupling(
        "the compiler of templates", "jinja2", ("jinja2.compiler:CodeGenerator.visit_Template",), ("data/text/sandbox.py",),
        "templates would have no limits", "tests render endless templates", ("self", "node", "frame"),
    ),
    Coupling(
        "the content of a template's namespace", "jinja2", ("jinja2.utils:Namespace#_Namespace__attrs",), ("data/text/meter.py",),
        "a template's text would not be counted", "tests render endless templates",
    ),
    Coupling(
        "panics of Rust code", "tokenizers", ("tokenizers:Tokenizer",), ("errors.py",),
        "a damaged tokenizer would end in a traceback", "the corpus of damaged tokenizers", written=("PanicException",),
    ),
    Coupling(
        "how a command is found", "typer", ("typer.core:TyperGroup.resolve_command", "typer.core:TyperCommand.format_help"),
        ("cli/app.py",), "an option before its command would be unknown", "tests of the command line",
        ("self", "ctx", "args"),
    ),
    Coupling(
        "the key that wandb finds", "wandb", ("wandb:api",), ("training/trackers.py",),
        "runs would go offline; wandb 0.31 announces its removal",
        "an AttributeError before training", written=("wandb.api.api_key",),
    ),
)  # fmt: skip
