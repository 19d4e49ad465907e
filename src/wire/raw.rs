//! Messages as they came, and their fields in place.
//!
//! The messages that carry items are not decoded by prost: it allocates every field before anybody can see how many there are, so
//! that a message within its size limit may need twenty times its size. [`RawMessage`] is one of them as it came, and [`Fields`]
//! goes through its fields without copying; [`decode`](super::decode) stops where a bound is reached.

use prost::{
    bytes::{Buf, Bytes},
    encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field},
};
use thiserror::Error;

/// A protobuf message that has not been decoded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RawMessage(pub Bytes);

/// Why bytes are not a protobuf message of the expected type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// A key, a length or a value is cut off or cannot be.
    #[error("it is cut off or damaged")]
    Damaged,
    /// A field has another type than the contract says.
    #[error("field {0} has the wrong type")]
    WrongType(u32),
    /// A string is not UTF-8.
    #[error("field {0} is not UTF-8")]
    NotUtf8(u32),
}

/// One field of a message.
#[derive(Debug, Clone, Copy)]
pub struct Field<'a> {
    number: u32,
    value: Value<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    Varint(u64),
    /// A string, a message, or a packed list.
    Bytes(&'a [u8]),
    /// A fixed-size number or a group, which no message of ours has.
    Other,
}

impl<'a> Field<'a> {
    /// Its number in the contract.
    pub fn number(self) -> u32 {
        self.number
    }

    /// The value of a message.
    pub fn bytes(self) -> Result<&'a [u8], Malformed> {
        match self.value {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(Malformed::WrongType(self.number)),
        }
    }

    /// The value of a string.
    pub fn text(self) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.bytes()?).map_err(|_invalid| Malformed::NotUtf8(self.number))
    }

    /// The value of an enum, cut to 32 bits as protobuf does.
    pub fn number_value(self) -> Result<i32, Malformed> {
        match self.value {
            Value::Varint(value) => Ok(value as i32),
            _ => Err(Malformed::WrongType(self.number)),
        }
    }

    /// Calls `add` with the values of a repeated enum, which may be packed, until it returns false.
    pub fn each_number(self, mut add: impl FnMut(i32) -> bool) -> Result<(), Malformed> {
        let Value::Bytes(mut packed) = self.value else {
            add(self.number_value()?);
            return Ok(());
        };
        while packed.has_remaining() {
            let value = decode_varint(&mut packed).map_err(|_error| Malformed::Damaged)?;
            if !add(value as i32) {
                break;
            }
        }
        Ok(())
    }
}

/// The fields of a message, in the order of the wire.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    rest: &'a [u8],
}

/// The bit by which a varint says that it goes on.
const CONTINUES: u8 = 0x80;

impl<'a> Fields<'a> {
    /// The fields of `message`.
    pub fn of(message: &'a [u8]) -> Self {
        Fields { rest: message }
    }

    /// The next field, if it has a length and both its key and its length take one byte, as almost all of a page of ids do.
    fn next_short_field(&mut self) -> Option<Field<'a>> {
        const HAS_LENGTH: u8 = WireType::LengthDelimited as u8;
        let [key, n_bytes, rest @ ..] = self.rest else { return None };
        let (number, wire_type) = (key >> 3, key & 7);
        if (key | n_bytes) & CONTINUES != 0 || wire_type != HAS_LENGTH || number == 0 {
            return None;
        }
        let (bytes, rest) = rest.split_at_checked(usize::from(*n_bytes))?;
        self.rest = rest;
        Some(Field { number: u32::from(number), value: Value::Bytes(bytes) })
    }

    fn next_field(&mut self) -> Result<Field<'a>, Malformed> {
        if let Some(field) = self.next_short_field() {
            return Ok(field);
        }
        let (number, wire_type) = decode_key(&mut self.rest).map_err(|_error| Malformed::Damaged)?;
        let value = match wire_type {
            WireType::Varint => Value::Varint(self.varint()?),
            WireType::LengthDelimited => {
                let n_bytes = usize::try_from(self.varint()?).map_err(|_too_long| Malformed::Damaged)?;
                let (bytes, rest) = self.rest.split_at_checked(n_bytes).ok_or(Malformed::Damaged)?;
                self.rest = rest;
                Value::Bytes(bytes)
            }
            _ => {
                let skipped = skip_field(wire_type, number, &mut self.rest, DecodeContext::default());
                skipped.map_err(|_error| Malformed::Damaged)?;
                Value::Other
            }
        };
        Ok(Field { number, value })
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        decode_varint(&mut self.rest).map_err(|_error| Malformed::Damaged)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, Malformed>;

    /// Ends after the first error.
    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.next_field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}
