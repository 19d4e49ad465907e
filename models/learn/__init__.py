"""The offline half of midemb: from interactions to a bundle that the server can load.

Read the files in the order in which data passes through them.

Data:

    data          the door to the six below
    readers       which data set lies in a folder, and how its log is read (catalogue: its items; checks, sql: helpers)
    prepare       raw files -> a prepared folder, in bounded memory (keywords: from tags)
    prepared      that folder -> Dataset, memory-mapped
    dataset       the types
    splits        what is trained on, what is predicted

From text to vectors:

    item_text     six fields -> the one prompt that the encoder reads
    ceg           prompt -> content embedding, by a frozen encoder (checkpoint, baichuan: weights of any layout;
                  batching, content_store: how a catalogue is encoded and kept; minilm: facts of the shipped encoder)
    standardise   content embeddings -> inputs that a first layer can learn from

Models and their training:

    recommender   what every retrieval model looks like from outside; LEARN, ID towers, content mean
    pch           content embeddings -> user and item embeddings (the towers)
    sasrec, hstu  the baselines
    lora          the language model tuned, in place of a transformer over its vectors
    sampling      which events of a long sequence are trained on
    losses        what the models are asked to do
    train         the loop that asks it (parallel: in several processes)
    retrieve      a trained model against the whole catalogue
    cvr           user and item embedding -> mid-emb and conversion probability
    cvr_train     how that head is trained, on frozen towers or with them

The ranking model, the paper's online test replayed:

    rank_study    arms with and without mid-emb (rank_split, rank_features, mid_embedding, ranker, rank_metrics)

Measuring and reporting:

    evaluate      full ranking, and popularity in the same harness (metrics: the figures)
    study         several models and seeds, a JSON a run (results: what stands in it)
    report        REPORT.md from those JSONs (claims, verdicts, evidence, significance, report_*; figures: manifests)

To the server:

    graphs        the four modules that the server runs, and that its golden vectors come from
    export        the encoder -> ONNX (linear: its products read weights as they are stored)
    lean          the towers and the head -> ONNX, the same functions for less work
    bundle        ONNX + tokenizer + golden vectors -> a checked folder
    default       what the shipped bundle covers and says of itself
    bulk          a whole catalogue's embeddings as Parquet (bundle_graphs, item_shards, digests)
    snapshot      that Parquet -> what the server imports
    verify        a live server against PyTorch (wire: its protocol)
    fixture       tiny random bundles for tests

    settings      all settings of a run in one TOML (config: strict reading)
    run           one training run as a folder; cli gives each of its steps a command

Facts of the method, and what they are taken from, stand beside the code that uses them.
"""
