"""Files of adapters: one safetensors file with everything that ``tensorpeft.load`` needs.

    header.py          what the file says beside its tensors: a value, and its canonical text
    files.py           header and tensors <-> the file
    whole.py           a file that is replaced as a whole
    compatibility.py   header x model: whether the adapter was saved from such a base

Nothing here knows the adapter's module: ``runtime.saving`` takes it apart.
"""
