"""One optimizer step. Read: bucket, engine, verdict, matrix_exchange, grad_reduce, param_gather, storage, hooks."""
