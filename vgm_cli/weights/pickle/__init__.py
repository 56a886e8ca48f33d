"""Pickles and torch files opened without running them.

A pickle is a program. Here every name it asks for is looked up in a table: tensors, arrays and containers are real;
classes that checkpoints carry beside their weights (argparse.Namespace, Lightning's callbacks, OmegaConf's nodes,
NVIDIA's persistent modules with their source, pickled torch modules) become inert `Shell`s, which only remember what
the file says about them; anything else is refused by name. torch files go through torch.load(weights_only=True) with
the shells added. A program can also build more than any memory holds, or a tree that takes for ever to walk: a budget
of operations, elements and bytes, counted before anything is made, ends both. Torch-free at import.

shells: the inert objects. table: what a file may name. machine: pickle's machine, its work counted. unpickle: the
machine with the table, and torch's files.
"""
