"""Published checkpoints: read without running them, recognised, converted both ways, and proved.

pickle/, msgpack: what others' files are made of, and budget, what they may make this program build. reading: a file of
any kind -> Python objects; contents: those -> dictionaries of tensors; nested: the networks in them, whatever wraps
them. files: files as states, read and written. layout: which published layout (convert_api.Layout) a state has.
source, convert, prove: `vgm convert`. inspect: `vgm inspect`. compare: when two tensors are the same.
state: the weights of one fixed network, such as LPIPS, out of any kind of file.
"""
