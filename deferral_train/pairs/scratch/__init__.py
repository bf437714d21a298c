"""Training a drafter and a verifier from scratch: tokenizer, models, loop, distillation, record of what was seen."""
