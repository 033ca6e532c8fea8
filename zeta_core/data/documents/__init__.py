"""Stage 3, documents: rendering a row as texts, with the spans of characters that are trained on.

`rendering` is the entry point and splits preference rows, `conversations` finds the spans of answers,
`template` renders chat templates, `coverage` checks that a template omits nothing, and `control_tokens` keeps control
tokens in the data apart from those of the template.
"""
