import Foundation

/// What the chat screen shows. It changes only by events, so that every path through it can be tested without a screen.
public struct ChatState: Sendable, Equatable {
    public struct Message: Sendable, Equatable, Identifiable {
        public enum Role: Sendable, Equatable { case user, assistant }

        public let id: Int
        public let role: Role
        public internal(set) var text: String
        /// It was ended before the model ended it: by the user, the background, heat or memory.
        public internal(set) var isCut = false
        /// What the question was read with, and had left the window.
        public internal(set) var recalled: Recollection?
    }

    public struct Recollection: Sendable, Equatable {
        public let text: String
        public let isFromUser: Bool
        public let when: Date

        public init(text: String, isFromUser: Bool, when: Date) {
            (self.text, self.isFromUser, self.when) = (text, isFromUser, when)
        }
    }

    public enum Phase: Sendable, Equatable {
        case noModel
        /// 0...1
        case loading(Double)
        case idle
        /// The message before the answer: tokens.
        case reading(done: Int, total: Int)
        case writing
        /// Saved and out of memory.
        case suspended(SuspensionReason)
    }

    public enum SuspensionReason: Sendable, Equatable { case background, memory, heat }

    public enum Notice: Sendable, Equatable {
        case tooHot
        case memoryShort
        /// The cache that the model asks for does not fit: it has this many tokens instead.
        case smallerCache(Int)
        /// The saved session could not be restored; it was kept under another name.
        case sessionLost(String)
        /// A sentence of the engine's or the store's.
        case failure(String)
    }

    public private(set) var phase = Phase.noModel
    public private(set) var messages: [Message] = []
    public private(set) var droppedCount = 0
    public private(set) var gauge = Gauge()
    public private(set) var notice: Notice?
    private var nextID = 0
    private var byteCount = 0

    /// The screen keeps as much of an endless conversation as the session file does.
    static let transcriptBytes = 1_000_000

    public init() {}

    public var isBusy: Bool {
        switch phase {
        case .loading, .reading, .writing: true
        case .noModel, .idle, .suspended: false
        }
    }

    public var canSend: Bool { phase == .idle || isAsleep }
    public var canRegenerate: Bool { phase == .idle && messages.last?.role == .assistant }

    /// Out of memory for a reason that is not the background: saying something wakes it up.
    var isAsleep: Bool { phase == .suspended(.memory) }

    public mutating func apply(_ event: ChatEvent) {
        switch event {
        case .loading(let share):
            phase = .loading(share)
        case .opened(let transcript, let dropped):
            phase = .idle
            messages = []
            byteCount = 0
            droppedCount = dropped
            for (role, text) in transcript {
                append(role, text)
            }
        case .said(let text):
            append(.user, text)
            append(.assistant, "")
            phase = .reading(done: 0, total: 0)
            notice = nil
        case .regenerating:
            guard messages.last?.role == .assistant else { return }
            removeLast()
            append(.assistant, "")
            phase = .writing
            notice = nil
        case .reading(let done, let total):
            if case .reading = phase {
                phase = .reading(done: done, total: total)
            }
        case .wrote(let text):
            guard isBusy, messages.last?.role == .assistant else { return }
            phase = .writing
            messages[messages.count - 1].text += text
            byteCount += text.utf8.count
        case .recalled(let recollection):
            guard isBusy, messages.last?.role == .assistant else { return }
            messages[messages.count - 1].recalled = recollection
        case .ended(let isCut):
            guard isBusy else { return }
            phase = .idle
            if isCut, messages.last?.role == .assistant {
                messages[messages.count - 1].isCut = true
            }
            trim()
        case .tookBack:
            guard isBusy else { return }
            if messages.last?.role == .assistant { removeLast() }
            if messages.last?.role == .user { removeLast() }
            phase = .idle
        case .suspended(let reason):
            phase = .suspended(reason)
        case .closed:
            let last = notice  // the user may not have read it yet
            self = ChatState()
            notice = last
        case .cleared:
            messages = []
            (byteCount, droppedCount) = (0, 0)
        case .noticed(let new):
            notice = new
        case .measured(let new):
            gauge = new
        }
    }

    private mutating func append(_ role: Message.Role, _ text: String) {
        messages.append(Message(id: nextID, role: role, text: text))
        nextID += 1
        byteCount += text.utf8.count
    }

    private mutating func removeLast() {
        byteCount -= messages.removeLast().text.utf8.count
    }

    private mutating func trim() {
        while byteCount > Self.transcriptBytes && messages.count > 2 {
            byteCount -= messages.removeFirst().text.utf8.count
            droppedCount += 1
        }
    }
}

public enum ChatEvent: Sendable {
    case loading(Double)
    case opened(transcript: [(ChatState.Message.Role, String)], dropped: Int)
    case said(String)
    case regenerating
    case reading(done: Int, total: Int)
    case wrote(String)
    /// The message was read with it.
    case recalled(ChatState.Recollection)
    case ended(isCut: Bool)
    /// Reading failed or was cancelled: the message is taken back.
    case tookBack
    case suspended(ChatState.SuspensionReason)
    case closed
    case cleared
    case noticed(ChatState.Notice?)
    case measured(Gauge)
}

/// What shows that an endless stream costs no more than a short one.
public struct Gauge: Sendable, Equatable {
    public var seen: Int64 = 0
    public var cached = 0
    public var contextSize = 0
    public var tokensPerSecond = 0.0
    /// What the app takes, in bytes; nil where the system does not tell.
    public var footprint: UInt64?
    public var thermal = ThermalLevel.nominal

    public init() {}

    /// 0...1
    public var fill: Double { contextSize == 0 ? 0 : Double(cached) / Double(contextSize) }
}
