//! The codec of our services.
//!
//! Bytes that are not a valid message are the caller's fault: tonic's own codec answers INTERNAL, which would page our operators
//! for a client's bug. And messages that carry items are handed on as they came ([`RawMessage`]), because decoding them has
//! bounds that only [`decode`](super::decode) knows.

use super::raw::RawMessage;
use prost::{Message, bytes::Buf};
use std::marker::PhantomData;
use tonic::{
    Status,
    codec::{BufferSettings, Codec as TonicCodec, DecodeBuf, Decoder},
};
use tonic_prost::{ProstCodec, ProstEncoder};

/// A message that comes in.
pub trait Incoming: Send + 'static + Sized {
    /// Takes all of `buffer`.
    fn take(buffer: &mut DecodeBuf<'_>) -> Result<Self, Status>;
}

impl<M: Message + Default + 'static> Incoming for M {
    fn take(buffer: &mut DecodeBuf<'_>) -> Result<Self, Status> {
        M::decode(buffer).map_err(|error| Status::invalid_argument(format!("request: {error}")))
    }
}

impl Incoming for RawMessage {
    /// Copies nothing.
    fn take(buffer: &mut DecodeBuf<'_>) -> Result<Self, Status> {
        Ok(RawMessage(buffer.copy_to_bytes(buffer.remaining())))
    }
}

/// Encodes `T`, takes in `U`.
#[derive(Debug)]
pub struct Codec<T, U> {
    outgoing: ProstCodec<T, T>,
    incoming: PhantomData<U>,
}

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Codec { outgoing: ProstCodec::default(), incoming: PhantomData }
    }
}

impl<T, U> TonicCodec for Codec<T, U>
where
    T: Message + Default + Send + 'static,
    U: Incoming,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = CheckedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        self.outgoing.encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        CheckedDecoder { incoming: PhantomData }
    }
}

/// Takes in `U`, or fails with INVALID_ARGUMENT.
#[derive(Debug)]
pub struct CheckedDecoder<U> {
    incoming: PhantomData<U>,
}

impl<U: Incoming> Decoder for CheckedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        U::take(buffer).map(Some)
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::default()
    }
}
