"""The keys and values that are allowed in a model's JSON files: configs, tokenizer files and adapter configs."""
