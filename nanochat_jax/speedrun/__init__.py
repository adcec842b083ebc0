"""The pipeline from raw text to a chat model: `recipes` are its commands, `plan` adds what depends
on the machine, `runner` runs the stages that are not finished.
"""
