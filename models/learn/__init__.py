"""The offline half of midemb: from interactions to a bundle that the server can load.

Read the packages in the order in which data passes through them; each imports only those before it (tests/
test_architecture.py). Code that only studies and the report need is in the package `research`, beside this one.

    data             raw logs -> Dataset and Split; its __init__ lists the modules

    content          from text to vectors
        ceg              prompt -> content embedding, by a frozen encoder
        encoder_graph    the encoder as the server runs it
        graph_encoder    an encoder that is an ONNX graph already, run by ONNX Runtime
        language_model   a checkpoint's folder -> the model (baichuan: one more layout; minilm: the shipped encoder)
        batching         rows of unequal length -> batches with little padding
        embedding_store  a catalogue's embeddings on disk (text_store: the vectors of single texts)
        content_table    the same as a model looks them up, in memory or not
        standardise      content embeddings -> inputs that a first layer can learn from

    models
        pch              content embeddings -> user and item embeddings (the towers)
        content_skip     content that goes past the transformer, in both towers
        cvr              user and item embedding -> mid-emb and conversion probability
        recommender      what every retrieval model looks like from outside; LEARN, ID towers, content mean
        served_graphs    towers and head as the server runs them
        weights_file     their weights on disk

    evaluation
        metrics          figures from ranks
        auc              AUC, weighted or per user; UAUC
        full_ranking     the whole catalogue ranked for each held-out event, by towers or by popularity
        retrieval        the same for any recommender

    training
        train_config         the settings of a run of the towers
        trainer              one step of any recommender: draws, losses (losses, sampling), gradients
        train_recommender    the loop: checks on validation, and where a run resumes (listeners: who is told)
        run_length           how long that is, and what to change next time
        content_skip         the skip of trained towers, with the weight that validation chooses
        train_cvr_head       the head, on frozen towers and then with them (cvr_tuning)
        cvr_config, cvr_events, cvr_negatives   its settings; the events that it learns from
        log_needs            what training needs of a log, checked first
        best_weights         training ends with the weights that were best on validation
        data_parallel        training in several processes

    serving
        bundle_format    ports, and entries of the manifest
        placing          a finished bundle in the place of an earlier one, safe against interruptions
        encoder_export   the encoder -> ONNX (gemm_rewrite: its products read weights as they are stored)
        int8_encoder     the encoder's graph in int8, made once per run (quantise: how)
        tower_export     the towers and the head -> ONNX, written node by node
        bundle           ONNX, tokenizer and golden vectors -> a checked folder (bundle_check: the check)
        shipped_bundle   the contents and the manifest of the shipped bundle
        upgrade          a bundle of format 1 -> format 2, without its models
        bulk_embedding   a whole catalogue's vectors as Parquet (bundle_inference, item_shards, digests)
        cache_snapshot   that Parquet -> what the server imports
        verify_server    a live server against PyTorch (verify_cases: what is sent; grpc_messages: its protocol)
        fixture_bundles  tiny random bundles for tests

    run_settings     all settings of a run in one TOML file (toml_config: strict reading)
    training_run     one training run as a folder
    allocator, atomic_file, padding, progress   small helpers that any package may use
    cli              one command for each step of a run (run_, study_ and features_arguments: their arguments)

Facts about the method are documented, with their sources, beside the code that uses them.
"""

import os

# ONNX Runtime reads it while its module is imported. Unless it is set, that writes a device id into the home folder and
# looks up a host of its maker.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
