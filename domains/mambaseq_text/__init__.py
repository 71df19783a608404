"""Text: bytes or a tokenizer.json, long corpora, packed documents, streams."""

from __future__ import annotations

from mambaseq.domain import Domain

domain = Domain(
    name="text",
    summary="language modelling over bytes or word pieces: corpora, packed documents, streams",
    tokenizers={
        "bytes": (
            "mambaseq_text.tokenization:ByteTokenizer",
            "UTF-8 bytes; no download, no unknown tokens",
        ),
        "hf": ("mambaseq_text.tokenization:HFTokenizer", "a Hugging Face tokenizer.json"),
    },
    datasets={
        "corpus": ("mambaseq_text.corpus:CorpusData", "windows of long texts, tokenised once"),
        "documents": (
            "mambaseq_text.documents:DocumentData",
            "documents, packed without crossing, or streamed",
        ),
        "chats": ("mambaseq_text.chats:ChatData", "conversations, or prompts and answers; the loss is that of answers"),
    },
    readers={"text": ("mambaseq_text.reading:read_text", "plain text, jsonl, parquet")},
    writers={"text": ("mambaseq_text.writing:write_text", "plain text or jsonl")},
    recipes={
        "mixers": (
            "mambaseq_text.recipes.mixers:recipe",
            "every mixer at a million parameters: loss, speed, memory, state",
        ),
        "ablations": (
            "mambaseq_text.recipes.ablations:recipe",
            "Mamba paper, Tables 6 to 10: what selection is made of",
        ),
        "books": (
            "mambaseq_text.recipes.books:recipe",
            "novels in bytes and word pieces: Mamba-1 to -3, delta rules, hybrids, a Transformer, by tokens and time",
        ),
    },
    configs={
        "pile": ("mambaseq:configs/text/pile.yaml", "the Pile with the Mamba paper's recipe, 125 M parameters"),
        "slimpajama": ("mambaseq:configs/text/slimpajama.yaml", "SlimPajama with that recipe"),
        "fineweb_edu": ("mambaseq:configs/text/fineweb_edu.yaml", "FineWeb-Edu with that recipe"),
        "wikitext103": ("mambaseq:configs/text/wikitext103.yaml", "WikiText-103 with that recipe"),
        "chat": ("mambaseq:configs/text/chat.yaml", "fine-tuning of a published model on conversations"),
        "mamba3": ("mambaseq:configs/text/mamba3.yaml", "the demo with Mamba-3, minutes on a CPU"),
        "gated_delta": ("mambaseq:configs/text/gated_delta.yaml", "the demo with the gated delta rule"),
        "kda": ("mambaseq:configs/text/kda.yaml", "the demo with Kimi Delta Attention"),
        "gla": ("mambaseq:configs/text/gla.yaml", "the demo with gated linear attention"),
        "ddp_context": ("mambaseq:configs/text/ddp_context.yaml", "the demo on four processes, pairs share sequences"),
        "ddp_context_chunks": ("mambaseq:configs/text/ddp_context_chunks.yaml", "the same chunk by chunk, in bf16"),
        "fsdp2_context": ("mambaseq:configs/text/fsdp2_context.yaml", "the same sharded, layers run again, in bf16"),
        "demo": ("mambaseq:configs/text/demo.yaml", "Shakespeare byte by byte, minutes on a CPU"),
    },
    commands={
        "lambada": (
            "mambaseq_text.commands:lambada",
            "accuracy and perplexity of passages' last words: --checkpoint RUN FILE",
        ),
        "perplexity": (
            "mambaseq_text.commands:perplexity",
            "perplexity of documents of any length, by the state passed on: --checkpoint RUN FILE [FILE ...]",
        ),
        "recall": (
            "mambaseq_text.commands:recall",
            "numbers hidden in long texts, found again or not, by length and depth: --checkpoint RUN [--scale full]",
        ),
    },
    reports={"demo": ("mambaseq_text.report:report", "bits a byte next to count models, and a sample")},
)
