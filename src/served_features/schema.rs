//! What a file looks like: its columns, which docs/served-features.md describes to its readers, and how they are encoded.

use parquet::{
    basic::Compression,
    errors::ParquetError,
    file::properties::{EnabledStatistics, WriterProperties},
    schema::{
        parser::parse_message_type,
        types::{SchemaDescriptor, TypePtr},
    },
};
use std::sync::Arc;

/// The columns in the order of the file. Only vectors, cvr and the user's id may be null.
const MESSAGE: &str = "message served_features {
    REQUIRED BYTE_ARRAY request_id (STRING);
    OPTIONAL BYTE_ARRAY user_id (STRING);
    REQUIRED INT64 time (TIMESTAMP(MICROS, true));
    REQUIRED BYTE_ARRAY model_name (STRING);
    REQUIRED BYTE_ARRAY model_version (STRING);
    REQUIRED BYTE_ARRAY bundle_digest (STRING);
    REQUIRED INT32 position;
    REQUIRED BYTE_ARRAY item_id (STRING);
    REQUIRED BYTE_ARRAY status (STRING);
    OPTIONAL GROUP mid_emb (LIST) { REPEATED GROUP list { REQUIRED FLOAT element; } }
    OPTIONAL FLOAT cvr;
    OPTIONAL GROUP user_emb (LIST) { REPEATED GROUP list { REQUIRED FLOAT element; } }
    OPTIONAL GROUP item_emb (LIST) { REPEATED GROUP list { REQUIRED FLOAT element; } }
    REQUIRED INT32 history_length;
}";

/// Columns whose values hardly repeat, so that a dictionary of them would be made in vain.
const WITHOUT_DICTIONARY: [&str; 5] = ["position", "item_id", "mid_emb", "cvr", "item_emb"];
/// By which readers leave out row groups. Nobody asks for the smallest number in a vector.
const WITH_STATISTICS: &str = "time";

/// The schema of every file.
pub(super) fn schema() -> Result<TypePtr, ParquetError> {
    Ok(Arc::new(parse_message_type(MESSAGE)?))
}

/// How every file is encoded. Nothing is compressed: single-precision vectors hardly shrink, and not even the fastest compression is
/// as cheap as writing them.
pub(super) fn properties(schema: &TypePtr) -> WriterProperties {
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::UNCOMPRESSED)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true);
    for column in SchemaDescriptor::new(Arc::clone(schema)).columns() {
        let path = column.path();
        let name = path.parts().first().map_or("", String::as_str);
        if WITHOUT_DICTIONARY.contains(&name) {
            properties = properties.set_column_dictionary_enabled(path.clone(), false);
        }
        if name == WITH_STATISTICS {
            properties = properties.set_column_statistics_enabled(path.clone(), EnabledStatistics::Chunk);
        }
    }
    properties.build()
}
