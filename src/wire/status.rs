//! Maps the closed set of errors to gRPC statuses with `google.rpc` details.

use crate::{
    config::{ConfigError, fault::that_fit},
    domain::{
        bounded_text::{MAX_MESSAGE_BYTES, cut},
        error::Error,
    },
    lifecycle::PushError,
    telemetry::events,
};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// Converts an error to a status and logs it; errors are logged nowhere else.
pub(super) fn to_status(method: &'static str) -> impl Fn(Error) -> Status {
    move |error| {
        events::request_failed(method, &error);
        from_error(&error)
    }
}

/// The status for a request's error. Its message is fit for clients; causes stay in the log.
pub fn from_error(error: &Error) -> Status {
    let message = cut(&error.to_string(), MAX_MESSAGE_BYTES).into_owned();
    match error {
        Error::InvalidArgument(violations) => {
            let violations: Vec<FieldViolation> =
                violations.iter().map(|v| FieldViolation::new(&v.field, &v.description)).collect();
            Status::with_error_details(Code::InvalidArgument, message, ErrorDetails::with_bad_request(violations))
        }
        Error::Shed { retry_after, .. } => {
            let details = ErrorDetails::with_retry_info(Some(*retry_after));
            Status::with_error_details(Code::ResourceExhausted, message, details)
        }
        Error::ModelNotFound(_) => Status::not_found(message),
        Error::DeadlineExceeded => Status::deadline_exceeded(message),
        Error::Unavailable(_) => Status::unavailable(message),
        Error::Internal { .. } => Status::internal(message),
    }
}

/// The most bytes of the faults in a status's details. With the message they travel in a header, in base64, and some clients
/// take 8 KB of headers in all.
const MAX_DETAILS_BYTES: usize = 2 << 10;

/// The status for a refused push. Operators may see the causes, too: paths, values, and by how much they differ.
pub fn from_push_error(error: &PushError) -> Status {
    let message = error.message();
    match error {
        PushError::Config(ConfigError::Invalid(faults)) => {
            let faults =
                that_fit(faults, MAX_DETAILS_BYTES).map(|fault| FieldViolation::new(&fault.key, &fault.reason));
            let details = ErrorDetails::with_bad_request(faults.collect::<Vec<_>>());
            Status::with_error_details(Code::InvalidArgument, message, details)
        }
        PushError::Config(_) => Status::invalid_argument(message),
        PushError::Conflict { .. } | PushError::Overtaken(_) | PushError::Busy(_) => Status::aborted(message),
        PushError::Draining => Status::unavailable(message),
        PushError::Library(_) | PushError::Failed(_) => Status::internal(message),
        PushError::Frozen(_)
        | PushError::Fetch { .. }
        | PushError::Bundle { .. }
        | PushError::Shadow { .. }
        | PushError::Persist { .. }
        | PushError::BundleReplaced { .. }
        | PushError::NoPreviousConfig => Status::failed_precondition(message),
    }
}

/// The name of a code in the gRPC specification, for the metrics' label.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::error::{FieldViolation as Violation, ShedReason};
    use std::time::Duration;

    #[test]
    fn each_error_maps_to_its_code_and_details() {
        let violation = Violation { field: "candidates[3].id".into(), description: "is empty".into() };
        let status = from_error(&Error::InvalidArgument(vec![violation]));
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "candidates[3].id: is empty"));
        assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "candidates[3].id");

        let shed = Error::Shed { reason: ShedReason::InFlight, retry_after: Duration::from_millis(50) };
        let status = from_error(&shed);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.get_details_retry_info().unwrap().retry_delay, Some(Duration::from_millis(50)));

        let status = from_error(&Error::internal("scoring", "a secret path"));
        assert_eq!((status.code(), status.message()), (Code::Internal, "internal error in scoring"));
        assert_eq!(from_error(&Error::model_not_found("x")).code(), Code::NotFound);
        let long = from_error(&Error::model_not_found(&"é".repeat(10_000)));
        assert!(long.message().len() < 200 && long.message().ends_with("…\" is served"), "{}", long.message());
        let many = vec![Violation { field: "f".repeat(100), description: "d".repeat(100) }; 16];
        assert_eq!(from_error(&Error::InvalidArgument(many)).message().len(), MAX_MESSAGE_BYTES);
        assert_eq!(from_error(&Error::DeadlineExceeded).code(), Code::DeadlineExceeded);
        assert_eq!(from_error(&Error::Unavailable("draining")).code(), Code::Unavailable);
    }
}
