import CEdgeStream
import Foundation

/// One step of an answer.
public struct Token: Sendable, Hashable {
    public enum Finish: Sendable, Hashable {
        /// The model ended its answer.
        case end
        /// `AnswerOptions.maxTokens`.
        case length
        /// `Session.stop()`.
        case stopped
        /// The answer repeated itself over and over (`AnswerOptions.endsLoops`). One period of the loop is kept.
        case repetition
    }

    /// Nil if the answer was stopped.
    public let id: Int32?
    /// The characters that are complete with this token: none, one or several.
    public let text: String
    /// The text belongs to the model's thinking. Where that ends within a token, there are two of it.
    public let isThinking: Bool
    /// Nil while the answer goes on.
    public let finish: Finish?
    /// Tokens seen since the stream's start, this one included.
    public let seen: Int64
    /// Tokens in the cache.
    public let cached: Int
    /// Since the answer began.
    public let tokensPerSecond: Double

    init(_ c: es_app_token, assembler: inout UTF8Assembler) {
        finish =
            switch c.finish {
            case Int32(ES_APP_EOS.rawValue): .end
            case Int32(ES_APP_LENGTH.rawValue): .length
            case Int32(ES_APP_STOPPED.rawValue): .stopped
            case Int32(ES_APP_REPETITION.rawValue): .repetition
            default: nil
            }
        var text = assembler.append(UnsafeRawBufferPointer(start: c.bytes, count: c.n_bytes))
        if let finish {
            let rest = assembler.finish()
            text += finish == .stopped ? "" : rest  // as in the transcript: a character that was cut off is left out
        }
        id = c.token < 0 ? nil : c.token
        self.text = text
        isThinking = c.is_thinking
        seen = c.n_past
        cached = Int(c.n_cached)
        tokensPerSecond = Double(c.tokens_per_s)
    }
}

public struct Message: Sendable, Hashable {
    public enum Role: String, Sendable, Hashable, Codable {
        case user, assistant
        /// What a tool answered.
        case tool
    }

    public let role: Role
    public let text: String
    /// What the model thought before it answered.
    public let thinking: String
    /// What the model wants to be called, as in OpenAI's messages: a JSON list. `Session.answer(toMessages:)` answers.
    public let toolCalls: String?

    public init(role: Role, text: String, thinking: String = "", toolCalls: String? = nil) {
        self.role = role
        self.text = text
        self.thinking = thinking
        self.toolCalls = toolCalls
    }
}

/// A line of the conversation that had left the window, and that a message was read with.
public struct Recalled: Sendable, Hashable, Codable {
    public let text: String
    /// Else the model said it.
    public let isFromUser: Bool
    /// Its number in the whole conversation.
    public let message: Int
    public let when: Date

    init?(_ c: es_app_recalled) {
        guard let text = c.text else { return nil }
        self.text = String(cString: text)
        isFromUser = c.is_from_user
        message = Int(c.message)
        when = Date(timeIntervalSince1970: TimeInterval(c.when))
    }
}

public struct StreamStats: Sendable, Hashable {
    /// Tokens seen since the stream's start.
    public let seen: Int64
    public let evicted: Int64
    public let slides: Int64
    public let cached: Int
    public let contextSize: Int
    public let sinks: Int

    init(_ c: es_stream_stats) {
        seen = c.n_past
        evicted = c.n_evicted
        slides = c.n_slides
        cached = Int(c.n_sinks + c.n_window)
        contextSize = Int(c.n_ctx)
        sinks = Int(c.n_keep)
    }
}

/// What a session file holds.
public struct SavedSession: Sendable, Hashable {
    public let contextSize: Int
    public let sinks: Int
    public let seen: Int64
    public let fingerprint: UInt64
    public let tag: UInt64
    public let messageCount: Int

    init(_ c: es_app_session_info) {
        contextSize = Int(c.n_ctx)
        sinks = Int(c.n_keep)
        seen = c.n_past
        fingerprint = c.fingerprint
        tag = c.model_tag
        messageCount = Int(c.n_messages)
    }

    /// True if the session was made with this model.
    public func belongs(to model: ModelInfo) -> Bool {
        fingerprint == model.fingerprint && tag == model.tag
    }
}
