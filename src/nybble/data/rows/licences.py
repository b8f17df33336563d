"""The licences of popular data sets, by Hub id or file name."""

from __future__ import annotations

from collections.abc import Iterable

from nybble.data.rows.sources import DataSource

NON_COMMERCIAL = "CC BY-NC 4.0: not for commercial use"
KNOWN = {
    # Hub id or file name: licence, as stated on the data set's own page or repository
    "tatsu-lab/alpaca": NON_COMMERCIAL,
    "alpaca_data.json": f"{NON_COMMERCIAL} (Stanford Alpaca)",
    "yahma/alpaca-cleaned": "CC BY 4.0, over text made with OpenAI's models and Alpaca's non-commercial terms",
    "alpaca_data_cleaned.json": "as Stanford Alpaca, which it cleans: not for commercial use",
    "vicgalle/alpaca-gpt4": NON_COMMERCIAL,
    "alpaca_gpt4_data.json": f"{NON_COMMERCIAL} (Alpaca GPT-4)",
    "databricks/databricks-dolly-15k": "CC BY-SA 3.0",
    "databricks-dolly-15k.jsonl": "CC BY-SA 3.0 (Dolly)",
    "OpenAssistant/oasst1": "Apache-2.0",
    "OpenAssistant/oasst2": "Apache-2.0",
    "timdettmers/openassistant-guanaco": "Apache-2.0",
    "HuggingFaceH4/ultrachat_200k": "MIT",
    "openai/gsm8k": "MIT",
    "GAIR/lima": "CC BY-NC-SA: not for commercial use",
    "GAIR/lima-train": "CC BY-NC-SA: not for commercial use",
    "Open-Orca/OpenOrca": "MIT, over text made with OpenAI's models",
    "knkarthick/dialogsum": "CC BY-NC-SA 4.0: not for commercial use",
}


def licences(sources: Iterable[DataSource]) -> list[str]:
    """One line for each data set on the Hub, and for each file whose licence is known."""
    lines = []
    for source in sources:
        if source.hub is not None:
            licence = KNOWN.get(source.hub.id) or source.hub.licence
            lines += [f"{source.name}: {licence}"] if licence else [f"{source.name}: its card names none"]
        lines += [f"{file.name}: {KNOWN[file.name]}" for file in source.files if file.name in KNOWN]
    return lines
