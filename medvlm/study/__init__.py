"""Studies: entries trained on the same data and evaluated alike, in one table and one picture.

A study is a YAML file; what it does are the commands of ``medvlm`` that a user would type, each once.
"""
