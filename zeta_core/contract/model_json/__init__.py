"""The keys and values that are allowed in a model's JSON files: its config, its tokenizer's and an adapter's."""
