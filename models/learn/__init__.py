"""The offline half of midemb: from interactions to a bundle that the server can load.

Read the files in the order in which data passes through them:

    data          raw data sets -> interactions, items, splits
    item_text     six fields -> the one prompt that the encoder reads
    ceg           prompt -> content embedding, by a frozen encoder
    pch           content embeddings -> user and item embeddings (the towers)
    sampling      which events of a long sequence are trained on
    losses        what the towers are asked to do
    train         the loop that asks it
    cvr           user and item embedding -> mid-emb and conversion probability
    cvr_train     how that head is trained, on frozen towers
    evaluate      full-ranking metrics, and popularity in the same harness
    graphs        the four modules that the server runs, and that its golden vectors come from
    export        the encoder -> ONNX
    lean          the towers and the head -> ONNX, the same functions for less work
    bundle        ONNX + tokenizer + golden vectors -> a checked folder
    default       what the shipped bundle covers and says of itself (its encoder's facts: minilm)
    fixture       a tiny random bundle for tests
    run           one training run as a folder; cli gives each of its steps a command

Facts of the method, and what they are taken from, stand beside the code that uses them.
"""
