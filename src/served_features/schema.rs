//! The columns of a file, which docs/served-features.md describes to its readers.

use parquet::{
    errors::ParquetError,
    schema::{
        parser::parse_message_type,
        types::{SchemaDescPtr, SchemaDescriptor},
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

/// The place of a column in the schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Column {
    RequestId,
    UserId,
    Time,
    ModelName,
    ModelVersion,
    BundleDigest,
    Position,
    ItemId,
    Status,
    MidEmb,
    Cvr,
    UserEmb,
    ItemEmb,
    HistoryLength,
}

/// The schema of every file.
pub(super) fn schema() -> Result<SchemaDescPtr, ParquetError> {
    Ok(Arc::new(SchemaDescriptor::new(Arc::new(parse_message_type(MESSAGE)?))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_has_its_place_in_the_schema() {
        let schema = schema().unwrap();
        let name = |column: Column| schema.column(column as usize).path().parts()[0].clone();
        assert_eq!(schema.num_columns(), Column::HistoryLength as usize + 1);
        let some = [Column::RequestId, Column::Time, Column::Status, Column::Cvr, Column::HistoryLength].map(name);
        assert_eq!(some, ["request_id", "time", "status", "cvr", "history_length"]);
        for list in [Column::MidEmb, Column::UserEmb, Column::ItemEmb] {
            let levels = (schema.column(list as usize).max_def_level(), schema.column(list as usize).max_rep_level());
            assert_eq!(levels, (2, 1), "{list:?}");
        }
    }
}
