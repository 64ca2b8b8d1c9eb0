/// Makes text of token bytes. A character may be split over tokens, so its first bytes wait here for the others.
///
/// What can no longer become a character is U+FFFD, one for each maximal part of one, as in Python and in the transcript.
public struct UTF8Assembler: Sendable {
    private var pending: [UInt8] = []  // the beginning of a character: at most 3 bytes

    public init() {}

    public var isWaiting: Bool { !pending.isEmpty }

    /// The text that is complete with these bytes.
    public mutating func append(_ bytes: some Sequence<UInt8>) -> String {
        pending.append(contentsOf: bytes)
        let whole = pending.count - Self.cutLength(pending)
        let text = String(decoding: pending[..<whole], as: UTF8.self)
        pending.removeFirst(whole)
        return text
    }

    /// There will be no more bytes: what is left, as U+FFFD.
    public mutating func finish() -> String {
        defer { pending = [] }
        return String(decoding: pending, as: UTF8.self)
    }

    /// How many bytes at the end begin a character that more bytes may complete.
    private static func cutLength(_ bytes: [UInt8]) -> Int {
        for length in 1...3 where length <= bytes.count {
            let lead = bytes[bytes.count - length]
            if lead & 0xC0 == 0x80 {
                continue  // goes on with what is before it
            }
            return length < sequenceLength(lead) && isPrefix(bytes.suffix(length)) ? length : 0
        }
        return 0
    }

    private static func sequenceLength(_ lead: UInt8) -> Int {
        switch lead {
        case 0xC2...0xDF: 2
        case 0xE0...0xEF: 3
        case 0xF0...0xF4: 4
        default: 1
        }
    }

    /// Overlong forms, surrogates and what is beyond U+10FFFF show in the second byte.
    private static func isPrefix(_ bytes: ArraySlice<UInt8>) -> Bool {
        guard bytes.count > 1, let lead = bytes.first else { return true }
        let second = bytes[bytes.startIndex + 1]
        switch lead {
        case 0xE0: return second >= 0xA0
        case 0xED: return second <= 0x9F
        case 0xF0: return second >= 0x90
        case 0xF4: return second <= 0x8F
        default: return true
        }
    }
}
