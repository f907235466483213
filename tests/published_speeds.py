"""Decode speeds that others published, one request at a time: what predictions are held against.

Not ours and not re-measured. `gb`: bytes that a token reads (10^9), from the file's tensors, rounded by who wrote them
down. Kept apart by `use`: "fit" rows made the constants of the profiles, so their errors show the form of the model,
not how well it foretells; "shown" rows are of another runtime, of a build of 2024, or lack the number of bytes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from efficli.target import Share, Work, load_target, predict


class Point(NamedTuple):
    """One published figure."""

    target: str
    model: str
    type: str
    """The type of most weights, as ggml calls it."""
    gb: float
    tokens_per_s: float
    source: str
    use: Literal["fit", "shown"] = "fit"
    weights: float | None = None
    """10^9 a token, where the type has less than 4 bits."""
    threads: int | None = None
    runtime: str = "llama.cpp"

    @property
    def work(self) -> Work:
        """As the predictor takes it."""
        bits = {"Q4_0": 4.5, "Q8_0": 8.5, "F16": 16.0}.get(self.type, 4.85)
        weights = self.gb * 8 / bits if self.weights is None else self.weights
        types = {self.type: Share(self.gb * 1e9, weights * 1e9)}
        return Work(file_bytes=int(self.gb * 1e9), types=types, threads=self.threads)

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        found = predict(load_target(self.target), self.work, self.runtime).decode
        assert found is not None
        return found.value / self.tokens_per_s - 1


AI, OLLAMA, POTATO = "geerlingguy/ai-benchmarks", "aidatatools/ollama-benchmark PR 9", "potato-os/core"
TMAC, LLAMAFILE = "microsoft/T-MAC", "guevara/read-it-later 11711"
LLAMA3B, LLAMA7B = "Llama-3.2-3B", "Llama-2-7B"

POINTS = (
    Point("pi-zero-2w", "SmolLM-360M", "Q4_K", 0.21, 2.6, "llm-inference.com"),
    Point("pi4-4gb", LLAMA3B, "Q4_K", 2.01, 1.60, AI),
    Point("pi4-2gb", "qwen1.5-1.8B", "Q4_0", 0.93, 3.05, OLLAMA),
    Point("pi4-2gb", "gemma-2B", "Q4_0", 1.68, 1.84, OLLAMA),
    Point("pi4-8gb", "Qwen3.5-0.8B", "IQ4_NL", 0.53, 5.0, POTATO),
    Point("pi4-8gb", "Qwen3.5-2B", "Q4_K", 1.40, 2.4, POTATO),
    Point("pi4-8gb", "TinyLlama", "Q8_0", 1.10, 3.0, LLAMAFILE),
    Point("pi4-8gb", "TinyLlama", "F16", 2.07, 2.0, LLAMAFILE),
    Point("pi5-8gb", LLAMA3B, "Q4_K", 2.01, 4.61, AI),
    Point("pi5-16gb", LLAMA3B, "Q4_K", 2.01, 4.51, AI),
    Point("pi5-16gb", LLAMA3B, "Q4_K", 2.01, 4.88, AI),
    Point("pi5-8gb", LLAMA3B + ", Pi 500", "Q4_K", 2.01, 4.53, AI),
    Point("pi5-16gb", LLAMA3B + ", Pi 500+", "Q4_K", 2.01, 5.55, AI),
    Point("pi5-16gb", LLAMA3B + ", CM5", "Q4_K", 2.01, 4.58, AI),
    Point("pi5-16gb", "Llama-3.1-8B", "Q4_K", 4.62, 2.05, AI),
    Point("pi5-16gb", "Llama-3.1-8B", "Q4_K", 4.62, 2.17, AI),
    Point("pi5-16gb", "Llama-2-13B", "Q4_0", 7.27, 1.35, AI),
    Point("pi5-16gb", "DeepSeek-R1-14B", "Q4_K", 8.55, 1.20, AI),
    Point("pi5-16gb", "Qwen3.5-4B, 4.74 bits", "Q4_K", 2.3, 5.0, POTATO),
    Point("pi5-16gb", "Qwen3.5-4B, 3.87 bits", "Q3_K", 1.9, 5.9, POTATO, weights=3.93),
    Point("pi5-8gb", "TinyLlama, 2024", "Q8_0", 1.10, 9.0, LLAMAFILE, "shown"),
    Point("pi5-8gb", "TinyLlama, 2024", "F16", 2.07, 5.0, LLAMAFILE, "shown"),
    Point("pi5-4gb", "qwen1.5-1.8B, 2024", "Q4_0", 0.93, 6.6, OLLAMA, "shown"),
    Point("pi5-4gb", "phi3-3.8B, 2024", "Q4_0", 2.2, 3.58, OLLAMA, "shown"),
    Point("pi5-16gb", "Qwen3.5-4B, ik_llama.cpp", "Q4_K", 2.6, 3.2, POTATO, "shown"),
    Point("pi5-8gb", LLAMA7B, "Q4_0", 3.75, 1.63, TMAC, weights=6.67, threads=2),
    Point("pi5-8gb", LLAMA7B, "Q2_K", 2.77, 1.31, TMAC, weights=6.6, threads=2),
    Point("pi5-8gb", "BitNet-3B", "Q2_K", 1.08, 2.71, TMAC, "shown", weights=3.3, threads=2),
    Point("pi5-16gb", "Qwen3-30B-A3B, 2.70 bits", "Q2_K", 1.11, 7.99, AI + " 47", "shown", weights=3.3),
    Point("pi5-8gb", LLAMA7B + " W4", "INT4", 3.76, 3.35, TMAC, threads=2, runtime="T-MAC"),
    Point("pi5-8gb", LLAMA7B + " W2", "INT2", 2.1, 5.92, TMAC, weights=6.6, threads=2, runtime="T-MAC"),
    Point("pi5-8gb", "BitNet-3B W2", "INT2", 0.87, 11.09, TMAC, weights=3.3, threads=2, runtime="T-MAC"),
    Point("snapdragon-7-gen-3", LLAMA3B + ", QCS6490", "Q4_K", 2.01, 4.81, AI),
    Point("snapdragon-8-gen-2", "Qwen3.5-2B, b10092", "Q4_K", 1.40, 15.48, "llama.cpp 26957", threads=5),
    Point("snapdragon-8-gen-2", "Qwen3.5-2B, b10369", "Q4_K", 1.40, 13.92, "llama.cpp 26957", threads=5),
    Point("snapdragon-8-gen-3", LLAMA7B, "Q2_K", 2.82, 5.43, TMAC, weights=6.6, threads=3),
    Point("snapdragon-8-gen-3", LLAMA7B + " W2", "INT2", 2.1, 13.88, TMAC, weights=6.6, threads=3, runtime="T-MAC"),
    Point("iphone-a18", LLAMA3B + ", laptop", "Q4_K", 2.01, 19.98, AI),
    Point("iphone-a19pro", "Qwen3.5-2B", "Q4_K", 1.40, 39.1, "apple-silicon-llm-bench", runtime="llama.cpp Metal"),
    Point("jetson-orin-nano", "LFM2.5-1.2B", "Q4_K", 0.73, 54.1, "smolhub.com", runtime="llama.cpp CUDA"),
    Point("jetson-orin-nano", "SmolLM2-135M", "Q4_K", 0.105, 165.0, "smolhub.com", runtime="llama.cpp CUDA"),
    Point("agx-orin", LLAMA7B + " W4", "INT4", 3.83, 8.09, TMAC, threads=12, runtime="T-MAC"),
    Point("agx-orin", LLAMA7B, "Q2_K", 2.82, 20.03, TMAC, weights=6.6, runtime="llama.cpp CUDA"),
    Point("cp8180", "TinyLlama", "Q4_K", 0.63, 40.4, AI),
    Point("cp8180", LLAMA3B, "Q4_K", 2.01, 13.1, AI),
    Point("cp8180", LLAMA3B + ", new firmware", "Q4_K", 2.01, 16.5, AI + " 51", "shown"),
)
