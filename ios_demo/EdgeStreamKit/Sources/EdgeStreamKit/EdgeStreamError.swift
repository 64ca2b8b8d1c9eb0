import CEdgeStream
import Foundation

/// What went wrong: a code to act on, and a sentence to show.
public struct EdgeStreamError: Error, Hashable, Sendable {
    public enum Code: Int32, Sendable, CaseIterable {
        /// An argument is out of range; nothing changed.
        case invalid = -1
        /// The model cannot stream, or has no chat template that can be used; nothing changed.
        case unsupported = -2
        case memory = -3
        /// llama.cpp could not compute; the session holds every token before the failure.
        case decode = -4
        /// Loading or reading was cancelled.
        case stopped = -5
        case io = -6
        case noSpace = -7
        /// Not a session file, or a damaged one.
        case format = -8
        /// A session file of a newer version.
        case version = -9
        /// A session file of another model or cache type.
        case otherModel = -10
        /// A bug of edge-stream's, reported rather than hidden.
        case `internal` = -11
        /// The session has been closed.
        case closed = 1
        /// The session was asked for something else, which ended the answer that this stream was writing.
        case superseded = 2
    }

    public let code: Code
    public let message: String

    public init(_ code: Code, _ message: String) {
        self.code = code
        self.message = message
    }

    /// Throws unless a status of the C API is ES_OK. To be called on the thread that got the status.
    static func check(_ status: Int32) throws(EdgeStreamError) {
        if status != ES_OK.rawValue {
            throw EdgeStreamError(Code(rawValue: status) ?? .internal, String(cString: es_last_error()))
        }
    }
}

extension EdgeStreamError: LocalizedError, CustomStringConvertible {
    public var errorDescription: String? { message }
    public var description: String { "\(message) (\(code))" }
}
