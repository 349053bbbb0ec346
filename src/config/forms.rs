//! Textual forms of values: how each is read, written and described.
//!
//! The attributes of [`super::sections`] name the form of each key. A form reads a value strictly, and returns an error
//! text if the value does not fit. It writes a value so that it can be read again. It describes the value to editors as
//! a JSON Schema. Bounds are part of the type of a form, so that the reader, the error text and the schema cannot
//! differ.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use http::{HeaderName, StatusCode};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::json;

use super::values::{
    parse_admin_address, parse_base_url, parse_code, parse_duration, parse_host, parse_level,
    parse_listen_address, parse_member, parse_mode, parse_name, parse_path, parse_peer_of_caller,
    parse_proxy, parse_rate, parse_reply_header, parse_required_header, parse_route_path, parse_size,
    parse_url,
};
use super::{Control, ListenAddress, PeerRule, ProxyUrl, Rate, Url};

/// A way to write a value in the file.
pub(super) trait Form {
    /// The type of the value in the configuration.
    type Value;

    /// Reads a value. The error is a text that is printed after the key.
    fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Self::Value, D::Error>;

    /// Writes a value so that [`Form::read`] returns it again.
    fn write<S: Serializer>(value: &Self::Value, to: S) -> Result<S::Ok, S::Error>;

    /// The JSON Schema for editors.
    fn schema() -> Schema;
}

/// A way to write a value as a text. Each implementation is a [`Form`], too.
pub(super) trait TextForm {
    /// The type of the value in the configuration.
    type Value;

    /// Returns the value, or an error text that is printed after the key.
    fn parse(text: &str) -> Result<Self::Value, String>;

    /// Returns a text from which [`TextForm::parse`] returns the value again.
    fn text(value: &Self::Value) -> String;

    fn schema() -> Schema {
        json_schema!({ "type": "string" })
    }
}

impl<F: TextForm> Form for F {
    type Value = F::Value;

    fn read<'de, D: Deserializer<'de>>(from: D) -> Result<F::Value, D::Error> {
        F::parse(&String::deserialize(from)?).map_err(Error::custom)
    }

    fn write<S: Serializer>(value: &F::Value, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&F::text(value))
    }

    /// The JSON Schema for editors: any text, unless the form says more.
    fn schema() -> Schema {
        <F as TextForm>::schema()
    }
}

/// Declares forms, each with the function that parses its text and the one that writes it.
macro_rules! texts {
    ($($name:ident: $value:ty = $parse:expr, $text:expr;)+) => {$(
        pub(super) struct $name;

        impl TextForm for $name {
            type Value = $value;

            fn parse(text: &str) -> Result<$value, String> {
                $parse(text)
            }

            fn text(value: &$value) -> String {
                $text(value)
            }
        }
    )+};
}

texts! {
    AdminAddress: SocketAddr = parse_admin_address, SocketAddr::to_string;
    BaseUrl: Url = parse_base_url, Url::to_string;
    Code: String = parse_code, String::clone;
    FilePath: PathBuf = parse_path, whole_path;
    Host: String = parse_host, String::clone;
    Level: String = parse_level, String::clone;
    Listen: ListenAddress = parse_listen_address, ListenAddress::to_string;
    Member: String = parse_member, String::clone;
    Mode: u32 = parse_mode, |mode: &u32| format!("{mode:04o}");
    Name: String = parse_name, String::clone;
    Peer: PeerRule = parse_peer_of_caller, PeerRule::to_string;
    PerTime: Rate = parse_rate, Rate::to_string;
    Proxy: ProxyUrl = parse_proxy, ProxyUrl::to_string;
    ReplyHeader: HeaderName = parse_reply_header, HeaderName::to_string;
    RequiredHeader: HeaderName = parse_required_header, HeaderName::to_string;
    RoutePath: String = parse_route_path, String::clone;
    TokenUrl: Url = parse_url, Url::to_string;
}

/// Returns the absolute path as a text. The effective configuration may be read in another directory, where a relative
/// path would mean another file.
fn whole_path(path: &PathBuf) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string()
}

/// A duration from `LOW` to `HIGH`, in milliseconds, both included.
pub(super) struct Period<const LOW: u64, const HIGH: u64>;

/// A second in milliseconds, the unit of the bounds of [`Period`].
pub(super) const SECOND: u64 = 1000;
/// A minute in milliseconds.
pub(super) const MINUTE: u64 = 60 * SECOND;
/// An hour in milliseconds.
pub(super) const HOUR: u64 = 60 * MINUTE;
/// A day in milliseconds.
pub(super) const DAY: u64 = 24 * HOUR;

impl<const LOW: u64, const HIGH: u64> TextForm for Period<LOW, HIGH> {
    type Value = Duration;

    fn parse(text: &str) -> Result<Duration, String> {
        let period =
            parse_duration(text).ok_or("must be a number with a unit: ms, s, m, h or d, as in \"10s\"")?;
        let is_within = (Duration::from_millis(LOW)..=Duration::from_millis(HIGH)).contains(&period);
        is_within.then_some(period).ok_or_else(|| format!("must be from {} to {}", time(LOW), time(HIGH)))
    }

    fn text(period: &Duration) -> String {
        match period.as_millis() {
            // In seconds, whatever unit the file has: the unit is not kept.
            milliseconds if milliseconds % 1000 == 0 => format!("{}s", milliseconds / 1000),
            milliseconds => format!("{milliseconds}ms"),
        }
    }

    fn schema() -> Schema {
        // The bounds are a `$comment`, since a pattern cannot bound a number with a unit.
        let bounds = format!("from {} to {}", time(LOW), time(HIGH));
        json_schema!({ "type": "string", "pattern": "^[0-9]+(ms|s|m|h|d)$", "$comment": bounds })
    }
}

/// Returns milliseconds in the largest unit that gives a whole number, for error texts.
fn time(milliseconds: u64) -> String {
    let units = [(DAY, "d"), (HOUR, "h"), (MINUTE, "m"), (SECOND, "s"), (1, "ms")];
    let unit =
        units.into_iter().find(|(unit, _)| milliseconds >= *unit && milliseconds.is_multiple_of(*unit));
    unit.map_or_else(|| "0s".to_owned(), |(unit, name)| format!("{}{name}", milliseconds / unit))
}

/// A size from `LOW` to `HIGH`, in bytes, both included.
pub(super) struct Size<const LOW: u64, const HIGH: u64, T = u64>(PhantomData<T>);

/// A KiB in bytes, the unit of the bounds of [`Size`].
pub(super) const KIB: u64 = 1 << 10;
/// A MiB in bytes.
pub(super) const MIB: u64 = 1 << 20;
/// A GiB in bytes.
pub(super) const GIB: u64 = 1 << 30;

impl<const LOW: u64, const HIGH: u64, T: Copy + TryFrom<u64> + TryInto<u64>> TextForm for Size<LOW, HIGH, T> {
    type Value = T;

    fn parse(text: &str) -> Result<T, String> {
        let size =
            parse_size(text).ok_or("must be a number with a unit: B, KiB, MiB or GiB, as in \"64MiB\"")?;
        within(size, LOW, HIGH)
            .ok_or_else(|| format!("must be from {} to {}", size_text(LOW), size_text(HIGH)))
    }

    fn text(size: &T) -> String {
        size_text((*size).try_into().unwrap_or(u64::MAX))
    }

    fn schema() -> Schema {
        let bounds = format!("from {} to {}", size_text(LOW), size_text(HIGH));
        json_schema!({ "type": "string", "pattern": "^[0-9]+(B|KiB|MiB|GiB)$", "$comment": bounds })
    }
}

/// Returns bytes in the largest unit that gives a whole number.
fn size_text(bytes: u64) -> String {
    let units = [(GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")];
    let unit = units.into_iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit));
    unit.map_or_else(|| format!("{bytes}B"), |(unit, name)| format!("{}{name}", bytes / unit))
}

/// Returns the number if it is from `low` to `high` and fits into the type.
fn within<T: TryFrom<u64>>(number: u64, low: u64, high: u64) -> Option<T> {
    Some(number).filter(|number| (low..=high).contains(number)).and_then(|number| T::try_from(number).ok())
}

/// Declares forms of optional values, each with the word that stands for "no value", since TOML has no null.
macro_rules! unless {
    ($($name:ident = $word:literal or $form:ty;)+) => {$(
        pub(super) struct $name;

        impl TextForm for $name {
            type Value = Option<<$form as TextForm>::Value>;

            fn parse(text: &str) -> Result<Self::Value, String> {
                if text == $word { Ok(None) } else { <$form>::parse(text).map(Some) }
            }

            fn text(value: &Self::Value) -> String {
                value.as_ref().map_or_else(|| $word.to_owned(), <$form>::text)
            }

            fn schema() -> Schema {
                json_schema!({ "anyOf": [<$form as TextForm>::schema(), { "const": $word }] })
            }
        }
    )+};
}

unless! {
    Lifetime = "none" or Period<SECOND, HOUR>;
    Retain = "forever" or Period<DAY, { 3650 * DAY }>;
    MaxSize = "none" or Size<{ 256 * KIB }, { 8192 * GIB }>;
}

/// A whole number from `LOW` to `HIGH`, both included.
pub(super) struct Whole<const LOW: u64, const HIGH: u64, T = usize>(PhantomData<T>);

impl<const LOW: u64, const HIGH: u64, T: Copy + TryFrom<u64> + TryInto<u64>> Form for Whole<LOW, HIGH, T> {
    type Value = T;

    fn read<'de, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
        // The reader's own reason is dropped: the one with the bounds says more, for a wrong type, too.
        let number = u64::deserialize(from).ok().and_then(|number| within(number, LOW, HIGH));
        number.ok_or_else(|| Error::custom(format!("must be a whole number from {LOW} to {HIGH}")))
    }

    fn write<S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64((*value).try_into().unwrap_or(u64::MAX))
    }

    fn schema() -> Schema {
        json_schema!({ "type": "integer", "minimum": LOW, "maximum": HIGH })
    }
}

/// The form of `server.workers`: a whole number, or `auto`, which is read as [`AUTO`].
pub(super) struct Workers;

/// The number that `auto` is read as. [`super::defaults`] replaces it with the number of workers.
pub(super) const AUTO: usize = 0;

impl Form for Workers {
    type Value = usize;

    fn read<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
        let number = match NumberOrText::deserialize(from) {
            Ok(NumberOrText::Text(text)) if text == "auto" => return Ok(AUTO),
            // 0 is out of bounds, so that `AUTO` cannot be written as a number.
            Ok(NumberOrText::Number(number)) => within(number, 1, 64),
            _ => None,
        };
        number.ok_or_else(|| Error::custom("must be a whole number from 1 to 64, or \"auto\""))
    }

    fn write<S: Serializer>(value: &usize, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(*value as u64)
    }

    fn schema() -> Schema {
        json_schema!({ "anyOf": [<Whole<1, 64> as Form>::schema(), { "const": "auto" }] })
    }
}

/// A number, or a text such as `auto`. A text of digits from a variable or a flag is read as a number.
#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(u64),
    Text(String),
}

/// The form of `admin.control`: the path of a socket, or `off`.
pub(super) struct ControlSocket;

impl Form for ControlSocket {
    type Value = Control;

    fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Control, D::Error> {
        let path = FilePath::read(from)?;
        Ok(if path.as_os_str() == "off" { Control::Off } else { Control::Path(path) })
    }

    fn write<S: Serializer>(control: &Control, to: S) -> Result<S::Ok, S::Error> {
        match control {
            Control::Default => to.serialize_none(),
            Control::Path(path) => to.collect_str(&path.display()),
            Control::Off => to.serialize_str("off"),
        }
    }

    fn schema() -> Schema {
        json_schema!({ "type": "string", "minLength": 1 })
    }
}

/// The form of a status in `token.refused_statuses`, by which the upstream may refuse a token.
pub(super) struct RefusedStatus;

impl Form for RefusedStatus {
    type Value = StatusCode;

    fn read<'de, D: Deserializer<'de>>(from: D) -> Result<StatusCode, D::Error> {
        let status = String::deserialize(from)?.parse::<StatusCode>().ok();
        // The request is sent again with another token, so the status must say that nothing was done. Others, such
        // as 500, do not say so.
        let status = status.filter(|status| matches!(status.as_u16(), 401 | 403 | 418));
        status.ok_or_else(|| Error::custom("must be a list of 401, 403 or 418"))
    }

    fn write<S: Serializer>(status: &StatusCode, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u16(status.as_u16())
    }

    fn schema() -> Schema {
        json_schema!({ "enum": [401, 403, 418, "401", "403", "418"] })
    }
}

/// An optional value. An absent key is `None` and is not read; a key that is present must have the inner form.
pub(super) struct Maybe<F>(PhantomData<F>);

impl<F: Form> Form for Maybe<F> {
    type Value = Option<F::Value>;

    fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Self::Value, D::Error> {
        F::read(from).map(Some)
    }

    fn write<S: Serializer>(value: &Self::Value, to: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => F::write(value, to),
            None => to.serialize_none(),
        }
    }

    fn schema() -> Schema {
        F::schema()
    }
}

/// A list of values of one form.
pub(super) struct Each<F>(PhantomData<F>);

impl<F: Form> Form for Each<F> {
    type Value = Vec<F::Value>;

    fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Self::Value, D::Error> {
        let items = Vec::<Item<F, F::Value>>::deserialize(from)?;
        Ok(items.into_iter().map(|Item(value, _)| value).collect())
    }

    fn write<S: Serializer>(values: &Self::Value, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(|value| Item::<F, _>(value, PhantomData)))
    }

    fn schema() -> Schema {
        let mut item = F::schema();
        if item.get("type").is_some_and(|kind| kind == "string") {
            // The reader takes a number in a list of texts for its digits, so the schema must not mark it as a
            // mistake.
            item.insert("type".into(), json!(["string", "integer"]));
        }
        json_schema!({ "type": "array", "items": item })
    }
}

/// One item of a list. It implements serde's traits with the form `F`, so that [`Each`] can use serde's own implementation
/// of lists.
struct Item<F, V>(V, PhantomData<F>);

impl<'de, F: Form> Deserialize<'de> for Item<F, F::Value> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        F::read(from).map(|value| Self(value, PhantomData))
    }
}

impl<F: Form> Serialize for Item<F, &F::Value> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        F::write(self.0, to)
    }
}

/// Adapts a form to serde's attribute `with`, which needs functions of these names, and to schemars.
pub(super) struct As<F>(PhantomData<F>);

impl<F: Form> As<F> {
    /// Reads a value in this form.
    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<F::Value, D::Error> {
        F::read(from)
    }

    /// Writes a value in this form.
    pub(super) fn serialize<S: Serializer>(value: &F::Value, to: S) -> Result<S::Ok, S::Error> {
        F::write(value, to)
    }
}

impl<F: Form> JsonSchema for As<F> {
    // Else the schema would have a definition for each form, and an editor would show its name instead of the
    // bounds.
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        std::any::type_name::<F>().into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        F::schema()
    }
}
