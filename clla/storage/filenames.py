"""Names of the files in a checkpoint, and of those that commands write beside one."""

# of transformers
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODEL_CARD = "README.md"
# our own
CHECKSUMS = "clla_checksums.json"
RECIPE = "clla_recipe.yaml"
REPORT = "clla_report.json"
PLAN_PICTURE = "clla_plan.png"
QUALITY_PICTURE = "clla_quality.png"
HEALING_PICTURE = "clla_healing.png"
EXPORT_REPORT = "clla_export.json"
COMPARISON = "comparison.json"
