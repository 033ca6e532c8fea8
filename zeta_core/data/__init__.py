"""Training data, from the sources of a spec to the batches of a step, in six stages.

| stage | package | entry point | input → output |
|---|---|---|---|
| 1. sources | `sources` | `open_sources` | the sources of a spec → `Source` objects whose first row was inspected |
| 2. rows | `rows` | `Source.units`, `Source.fields` | the bytes of a file → `Row` objects → values by standard names |
| 3. documents | `documents` | `Renderer.render` | a row → texts, with the spans of characters that are trained on |
| 4. tokens | `tokens` | `prepare_tokens` | all rows → a cached `TokenFile`: N ids of D documents, and statistics |
| 5. sequences | `sequences` | `Sequences`, `build_sampler` | documents → sequences of at most T tokens, in order |
| 6. batches | `sequences` | `Sequences.batch` | some sequences → a `MicroBatch` of tensors of shape [B, T] |

`zeta_core.run.inputs` runs stages 1 to 4, `zeta_core.run.decision` stage 5, and `zeta_core.train.accumulation` stage 6
for every micro-batch. Stages 1 to 4 process untrusted data, in forked processes with limits (`sandbox`).

`row_check` and `data_report` use several stages: `row_check` checks rows and tokenizes a sample before a run, and
`data_report` describes the data of a run. A stage imports only from earlier ones, except that `sources` imports `rows`,
because opening a source detects the format of its first row.
"""
