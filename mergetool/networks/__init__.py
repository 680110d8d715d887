"""The one seam to transformers.

    library    the library itself, imported late and kept quiet
    build      models from a folder or from tensors, and empty ones
    places     where every tensor of a checkpoint lies in a model
    tokenizer  the tokenizer of a folder
    plain      modules that the user's own code builds
    batch      a small input of the kind that a model takes
    trace      `architecture: auto`

Nobody else imports transformers (import-linter holds that): its versions rename tensors, options and loggers.
"""
